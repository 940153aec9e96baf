"""The words that a student and its teacher get wrong on the held-out split: what a distance in nats comes to.

Dimension key: U utterances, M mel bins, F frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qad_dist.asr.dataset import OnDamaged, languages_of, refuse, try_mels_ahead
from qad_dist.asr.groups import GroupDecoder, plan_groups
from qad_dist.asr.load import AsrModel
from qad_dist.asr.prompt import Prompt
from qad_dist.config import RunConfig
from qad_dist.config.label import LabelConfig
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.world import World
from qad_dist.text.wer import count_errors
from shards.errors import ShardError
from shards.index import UNKNOWN_LANGUAGE
from shards.labelled import LabelledTable, LabelledUtterance
from shards.read import Damaged
from shards.workers import Reader

Counts = npt.NDArray[np.int64]

NUM_GROUPS, SMALLEST_GROUP = 16, 8
"""Utterances are decoded in about so many groups, none of fewer utterances: what the ranks share."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOutWords:
    """Errors, utterance by utterance, in the order of the split; equal on all ranks.

    An utterance has the reference that its source has, or else the text of its label, which its teacher got right. One
    that cannot be read has no errors and no reference.
    """

    keys: tuple[str, ...]
    languages: tuple[str | None, ...]
    """As the source tells them, or else as the teacher detected them; whether words or characters are counted."""
    speakers: tuple[str | None, ...]
    errors_U: Counts
    """Of the student."""
    teacher_errors_U: Counts
    reference_tokens_U: Counts
    """Words, or characters."""
    is_human_U: npt.NDArray[np.bool_]
    """Whether the reference is a human transcript."""

    @property
    def is_reference_human(self) -> bool:
        """Whether all are."""
        return bool(self.is_human_U.all())


def count_heldout_words(
    run: RunConfig,
    student: AsrModel,
    rows: LabelledTable,
    reader: Reader,
    world: World,
    *,
    on_damaged: OnDamaged = refuse,
) -> HeldOutWords:
    """Decode utterances as they were labelled and count the errors; all ranks together.

    What is decoded together follows from utterances and settings, so that the errors do not depend on the ranks.

    Args:
        run: Says context, prompts' batches and limits of responses, as for labelling.
        student: On this rank's device; decodes fastest with its weights folded.
        rows: The utterances, with their labels.
        reader: Of their shards.
        world: Which rank this is.
        on_damaged: Is told of each utterance that cannot be read.

    Raises:
        ShardError: On every rank, when none can be read.
    """
    student = replace(student, prompt=student.prompt.with_context(run.label.context))
    codes, names = languages_of(rows, detected_first=False)
    languages = [names[code] for code in codes]
    own: dict[int, tuple[int, int, int]] = {}
    for place, hypothesis in _decode(run.label, student, rows, reader, world, on_damaged):
        reference, label = _reference_and_label(student.prompt, rows[place])
        counts = [count_errors(reference, text, language=languages[place]) for text in (hypothesis, label)]
        own[place] = counts[0].errors, counts[1].errors, counts[0].reference_length
    found = {place: counts for share in all_gather_objects(own) for place, counts in share.items()}
    if not found:
        error = ShardError("held-out utterances must be readable, got none that is; verify the shards and pack again")
        error.is_shared = True  # every rank has what all found
        raise error
    counts_U3 = np.array([found.get(place, (0, 0, 0)) for place in range(len(rows))], np.int64)
    return HeldOutWords(
        keys=tuple(str(key) for key in rows.utterances.texts("key")),
        languages=tuple(languages),
        speakers=tuple(rows.utterances.texts("speaker")),
        errors_U=counts_U3[:, 0],
        teacher_errors_U=counts_U3[:, 1],
        reference_tokens_U=counts_U3[:, 2],
        is_human_U=np.array([reference is not None for reference in rows.utterances.texts("reference")]),
    )


def word_error_rate(words: HeldOutWords) -> float:
    """The student's errors by tokens of the references; with none of these their number."""
    return _rate(words.errors_U, words.reference_tokens_U)


def word_error_rates(words: HeldOutWords) -> dict[str, float]:
    """The same of each language, in alphabetical order."""
    languages_U = np.array([language or UNKNOWN_LANGUAGE for language in words.languages])
    return {
        str(language): _rate(words.errors_U[is_in_U], words.reference_tokens_U[is_in_U])
        for language in np.unique(languages_U)
        for is_in_U in [languages_U == language]
    }


def _rate(errors_U: Counts, reference_tokens_U: Counts) -> float:
    return float(errors_U.sum() / max(1, reference_tokens_U.sum()))


def _reference_and_label(prompt: Prompt, row: LabelledUtterance) -> tuple[str, str]:
    utterance, response = row
    label, _ = prompt.parse(response.token_ids.tolist(), language=response.prompt_language)
    return label if utterance.reference is None else utterance.reference, label


def _decode(
    settings: LabelConfig,
    student: AsrModel,
    rows: LabelledTable,
    reader: Reader,
    world: World,
    on_damaged: OnDamaged,
) -> Iterator[tuple[int, str]]:
    """Place and text of this rank's utterances, as they end."""
    durations_U = rows.utterances.numbers("duration_seconds")
    groups = plan_groups(durations_U, settings, num_groups=NUM_GROUPS, smallest=SMALLEST_GROUP)
    own = groups[world.rank :: world.world_size]
    if not own:
        return
    names, codes_U = rows.responses.names, rows.responses.prompt_languages
    languages = [names[code] for code in codes_U]
    decoder = GroupDecoder(student, settings, durations_U, languages, groups)
    wanted = ([rows.utterances[place] for place in batch] for group in own for batch in group)
    loaded = try_mels_ahead(reader, wanted, student.extractor)
    for group in own:
        readable = [_readable(batch, next(loaded), on_damaged) for batch in group]
        for place, hypothesis in decoder.decode(readable):
            yield place, hypothesis.text


def _readable(
    batch: Sequence[int], mels: Sequence[Tensor | Damaged], on_damaged: OnDamaged
) -> list[tuple[int, Tensor]]:
    """Places and log-mels ``[M, F]`` of what can be read."""
    readable = []
    for place, mel_MF in zip(batch, mels, strict=True):
        if isinstance(mel_MF, Damaged):
            on_damaged(mel_MF)
        else:
            readable.append((place, mel_MF))
    return readable
