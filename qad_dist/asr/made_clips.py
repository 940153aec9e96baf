"""Clips that calibration makes where the data has too few: silence, and utterances joined to long ones.

The teacher answers them itself, greedily, in automatic language mode and with the context of the run. What is decoded
together follows from the clips alone, so that every rank makes the same ones without a word to the others.

Dimension key: A audio samples of a clip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import numpy.typing as npt

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.collate import Example, collate
from qad_dist.asr.dataset import languages_of
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.asr.prompt import Prompt
from qad_dist.asr.transcribe import Request, decode, response_limit, slot_length
from qad_dist.batch import Batch
from qad_dist.config.label import LabelConfig
from shards.audio import Samples
from shards.labelled import LabelledTable
from shards.schema import ENDED_BY_END_TOKEN, SAMPLE_RATE_HZ
from shards.workers import Reader

LONG_SECONDS = (20.0, 30.0)
"""Shortest and longest of what counts as long, made or not."""

SILENT_SECONDS = (1.0, 30.0)
"""Shortest and longest silence that is made."""

NOISE_DBFS = (-90.0, -50.0)
"""Lowest and highest root mean square of the noise, below full scale: from the last of 16 bits to a quiet room."""

# Decoded at once: the longest of Qwen3-ASR-0.6B, in float32 with their longest responses, take about 1.5 GB.
_SLOTS = 8
# One clip in so many is digital silence, without any noise.
_ONE_DIGITAL_IN = 4
_GOLDEN_RATIO = 0.618033988749895


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MadeClips:
    """Clips with the teacher's responses, silent ones first; batches of them are collated on demand."""

    examples: list[Example]
    """Keys are ``silent-000`` and ``long-000``. A response that reached its longest length is left out, and its clip
    keeps prompt and audio: what a decoder says that has lost the audio is no answer, and would fill up the set."""
    seconds: npt.NDArray[np.float64]
    """Of each clip."""
    num_tokens: npt.NDArray[np.int64]
    """Packed length of each."""
    prompt: Prompt
    """With the context of the run."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def num_runaway(self) -> int:
        """Clips whose response is left out."""
        return sum(not example.response_ids for example in self.examples)

    def batch(self, indices: Sequence[int]) -> Batch:
        """These clips, packed; at least one."""
        return collate([self.examples[index] for index in indices], prompt=self.prompt)


def make_clips(
    teacher: AsrModel, rows: LabelledTable, *, reader: Reader, silent: int, long: int, settings: LabelConfig
) -> MadeClips:
    """Make clips and let the teacher answer them; none of either kind if none are asked for.

    Args:
        teacher: As loaded, not yet quantized; the context is put into its prompt here.
        rows: Utterances to join, in the order of their strata; at least one if long clips are asked for.
        reader: Of their shards.
        silent: Clips of :func:`silent_clip`.
        long: Clips of :func:`plan_joins`.
        settings: Context and longest responses, as labels are made with.

    Raises:
        ShardError: An utterance that is to be joined cannot be read.
    """
    teacher = replace(teacher, prompt=teacher.prompt.with_context(settings.context))
    audios = {f"silent-{number:03d}": silent_clip(number, count=silent) for number in range(silent)}
    audios |= {f"long-{number:03d}": audio_A for number, audio_A in enumerate(_joined(rows, reader, long))}
    examples = _answered(teacher, audios, settings)
    lengths = [
        teacher.prompt.num_prompt_tokens(num_audio_tokens(e.mel_MF.shape[1])) + len(e.response_ids) for e in examples
    ]
    return MadeClips(
        examples=examples,
        seconds=np.array([len(audio_A) / SAMPLE_RATE_HZ for audio_A in audios.values()], np.float64),
        num_tokens=np.array(lengths, np.int64),
        prompt=teacher.prompt,
    )


def silent_clip(number: int, *, count: int) -> Samples:
    """Digital silence (one in four, from the first on) or white noise at one of :data:`NOISE_DBFS`. Pure.

    Args:
        number: Which one, from 0; the noise is its own.
        count: Of how many. Durations rise evenly over :data:`SILENT_SECONDS`; levels are spread at every duration.

    Returns:
        ``audio_A``, float32.
    """
    audio_A = np.zeros(round(_between(SILENT_SECONDS, (number + 0.5) / count) * SAMPLE_RATE_HZ), np.float32)
    if number % _ONE_DIGITAL_IN == 0:
        return audio_A
    # Multiples of it, without their whole parts, never lie close together: as even as can be after any number of them.
    level = 10 ** (_between(NOISE_DBFS, number * _GOLDEN_RATIO % 1) / 20)
    return level * np.random.default_rng(number).standard_normal(len(audio_A), np.float32)


def plan_joins(
    seconds: npt.NDArray[np.float64], languages: npt.NDArray[np.int64], *, count: int
) -> list[tuple[float, list[int]]]:
    """Which utterances are joined to long clips. Pure.

    A clip begins with another utterance each, at equal distances over all, and goes on with those that follow: in its
    language as far as they go, then in the others, and from the start again if there is less than a clip of audio. What
    is long by itself is joined only where nothing else is there.

    Args:
        seconds: Of each utterance, above 0.
        languages: A number for each.
        count: Clips.

    Returns:
        For each clip a length in :data:`LONG_SECONDS`, which rises evenly, and the places of utterances that reach it.
    """
    places = np.flatnonzero(seconds < LONG_SECONDS[0])
    places = places if len(places) else np.arange(len(seconds))
    joins = []
    for number in range(count):
        wanted = _between(LONG_SECONDS, (number + 0.5) / count)
        following = np.roll(places, -(number * len(places) // count))
        is_other = languages[following] != languages[following[0]]
        join, reached = [], 0.0
        for place in cycle(following[np.argsort(is_other, kind="stable")].tolist()):
            join.append(place)
            reached += float(seconds[place])
            if reached >= wanted:
                break
        joins.append((wanted, join))
    return joins


def _joined(rows: LabelledTable, reader: Reader, count: int) -> Iterator[Samples]:
    """The long clips, their last utterance whole if 30 s allow it."""
    if not count:
        return
    codes, _ = languages_of(rows, detected_first=True)
    joins = plan_joins(rows.utterances.numbers("duration_seconds"), codes, count=count)
    needed = sorted({place for _, join in joins for place in join})
    audios = dict(zip(needed, reader.read(rows.utterances.take(needed)), strict=True))
    for _, join in joins:
        yield np.concatenate([audios[place] for place in join])[: round(LONG_SECONDS[1] * SAMPLE_RATE_HZ)]


def _answered(teacher: AsrModel, audios: dict[str, Samples], settings: LabelConfig) -> list[Example]:
    if not audios:
        return []
    mels = log_mels(list(audios.values()), teacher.extractor)
    seconds = [len(audio_A) / SAMPLE_RATE_HZ for audio_A in audios.values()]
    limits = [
        response_limit(
            duration,
            max_response_tokens=settings.max_response_tokens,
            max_tokens_per_second=settings.max_tokens_per_second,
        )
        for duration in seconds
    ]
    requests = [Request(mel_MF, limit) for mel_MF, limit in zip(mels, limits, strict=True)]
    max_length = slot_length(teacher.prompt, seconds, limits, [None] * len(seconds))
    found = dict(decode(teacher, [requests], slots=min(_SLOTS, len(requests)), max_length=max_length))
    return [
        Example(
            key=key,
            mel_MF=mel_MF,
            response_ids=found[number].token_ids if found[number].ended_by == ENDED_BY_END_TOKEN else (),
        )
        for number, (key, mel_MF) in enumerate(zip(audios, mels, strict=True))
    ]


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
