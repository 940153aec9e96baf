"""Clips made for calibration: silence and joined utterances as they are said to be, with the teacher's own answers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.asr.made_clips import MadeClips, make_clips, plan_joins, silent_clip
from qad_dist.asr.mel import log_mel
from qad_dist.asr.transcribe import response_limit, transcribe
from qad_dist.config.label import LabelConfig
from shards.audio import encode_flac
from shards.errors import ShardError
from shards.index import read_utterances
from shards.labelled import LabelledTable
from shards.read import Shards
from shards.workers import Reader
from tests.helpers.damage import spoil
from tests.helpers.labelled import response_of, table_of
from tests.helpers.qwen import Samples, reference_tokens, windows
from tests.helpers.reading import write_shards
from tests.helpers.tones import make_tone

CONTEXT = "names: Anna, Tom"
# The embedded teacher hears words in noise, and goes on for long in some of it.
SILENT, LONG = 6, 3
MOST_TOKENS = 120


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, clips: list[Samples]) -> Path:
    """The spoken digits in two shards, 45 s in all."""
    folder = tmp_path_factory.mktemp("clips") / "pack"
    flacs = {f"digits-{number:02d}.flac": encode_flac(audio_A) for number, audio_A in enumerate(clips)}
    members = list(flacs.items())
    shards = {"train-000000.tar": dict(members[:12]), "train-000001.tar": dict(members[12:])}
    seconds = {f"digits-{number:02d}": len(audio_A) / 16_000 for number, audio_A in enumerate(clips)}
    write_shards(folder, shards, seconds=seconds)
    return folder


@pytest.fixture(scope="module")
def rows(packed: Path) -> LabelledTable:
    """Of two languages, as the teacher detected them."""
    return table_of(
        [
            (utterance, response_of(3, "English" if number < 12 else "German"))
            for number, utterance in enumerate(read_utterances(packed))
        ]
    )


@pytest.fixture(scope="module")
def reader(packed: Path) -> Iterator[Reader]:
    with Reader(Shards(packed)) as reader:
        yield reader


def settings_of(**changes: Any) -> LabelConfig:
    return LabelConfig(context=CONTEXT, max_response_tokens=MOST_TOKENS, **changes)


def make(
    model: AsrModel, rows: LabelledTable, reader: Reader, *, silent: int = SILENT, long: int = LONG, **settings: Any
) -> MadeClips:
    return make_clips(model, rows, reader=reader, silent=silent, long=long, settings=settings_of(**settings))


@pytest.fixture(scope="module")
def made(nano: AsrModel, rows: LabelledTable, reader: Reader) -> MadeClips:
    return make(nano, rows, reader)


def joined_audio(rows: LabelledTable, reader: Reader, number: int) -> Samples:
    """The utterances of a long clip, one behind the other."""
    seconds = rows.utterances.numbers("duration_seconds")
    _, places = plan_joins(seconds, rows.responses.languages, count=LONG)[number]
    return np.concatenate(reader.read(rows.utterances[place] for place in places))


def level_dbfs(audio_A: Samples) -> float:
    return 10 * float(np.log10(np.mean(audio_A.astype(np.float64) ** 2)))


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_durations_of_silence_are_spread_evenly_between_1_and_30_s(count: int) -> None:
    seconds = [len(silent_clip(number, count=count)) / 16_000 for number in range(count)]

    # The middles of as many equal parts of the 29 s.
    np.testing.assert_allclose(seconds, 1 + 29 * (np.arange(count) + 0.5) / count, atol=1 / 16_000)


def test_one_silent_clip_in_four_is_digital_silence_the_first_among_them() -> None:
    clips = [silent_clip(number, count=8) for number in range(8)]

    assert [not audio_A.any() for audio_A in clips] == [True, False, False, False] * 2
    assert all(audio_A.dtype == np.float32 for audio_A in clips)


def test_noise_is_white_and_between_90_and_50_db_below_full_scale() -> None:
    noises = [silent_clip(number, count=32) for number in range(32) if number % 4]

    levels = [level_dbfs(audio_A) for audio_A in noises]
    assert all(-90.1 < level < -49.9 for level in levels)  # the mean of 30,000 squares is 0.8 % off
    assert min(levels) < -85
    assert max(levels) > -55
    # Long and short ones are loud and soft alike.
    assert abs(np.corrcoef(range(len(levels)), levels)[0, 1]) < 0.3
    for audio_A in noises:
        power_F = np.abs(np.fft.rfft(audio_A)) ** 2
        quarters = [part.mean() / power_F.mean() for part in np.array_split(power_F, 4)]
        np.testing.assert_allclose(quarters, 1, atol=0.1)


def test_every_noise_is_another_one_and_the_same_every_time() -> None:
    one, other = silent_clip(1, count=4), silent_clip(2, count=4)

    assert abs(np.corrcoef(one, other[: len(one)])[0, 1]) < 0.02
    assert one.tobytes() == silent_clip(1, count=4).tobytes()


def test_joins_by_hand() -> None:
    """Four utterances of 9 s and four of 6 s: three clips that begin at the first, the third and the sixth."""
    seconds, languages = np.array([9.0] * 4 + [6.0] * 4), np.array([0] * 4 + [1] * 4)

    joins = plan_joins(seconds, languages, count=3)

    assert [wanted for wanted, _ in joins] == pytest.approx([20 + 10 / 6, 25, 20 + 50 / 6])
    assert [places for _, places in joins] == [
        [0, 1, 2],  # 27 s
        [2, 3, 0],  # 27 s, its language from the start again rather than another one
        [5, 6, 7, 4, 0],  # 24 s are all of the language: 33 s, to be cut
    ]


def test_what_is_long_by_itself_is_not_joined_unless_there_is_nothing_else() -> None:
    languages = np.zeros(3, np.int64)

    assert plan_joins(np.array([12.0, 20.0, 13.5]), languages, count=1) == [(25.0, [0, 2])]
    assert plan_joins(np.array([31.0, 35.0, 40.0]), languages, count=1) == [(25.0, [0])]


def test_little_audio_is_joined_again_and_again() -> None:
    joins = plan_joins(np.array([4.0, 5.0]), np.array([0, 1]), count=2)

    assert [places for _, places in joins] == [[0, 1] * 3, [1, 0, 1, 0, 1, 0, 1]]  # 22.5 s, 27.5 s


def test_kinds_and_numbers_are_those_asked_for(made: MadeClips) -> None:
    keys = [f"silent-{number:03d}" for number in range(SILENT)] + [f"long-{number:03d}" for number in range(LONG)]

    assert [example.key for example in made.examples] == keys
    assert len(made) == len(made.seconds) == len(made.num_tokens) == len(keys)
    assert all(20 <= seconds <= 30 for seconds in made.seconds[SILENT:])
    assert all(example.prompt_language is None for example in made.examples)


def test_silent_clips_reach_the_model_as_they_are(made: MadeClips, nano: AsrModel) -> None:
    for number, example in enumerate(made.examples[:SILENT]):
        expected = log_mel(silent_clip(number, count=SILENT), nano.extractor)

        # Whole batches are transformed together; the order of sums is another one.
        torch.testing.assert_close(example.mel_MF, expected, rtol=0, atol=1e-5)


def test_long_clips_are_the_utterances_of_their_plan_one_behind_the_other(
    made: MadeClips, nano: AsrModel, rows: LabelledTable, reader: Reader
) -> None:
    for number, example in enumerate(made.examples[SILENT:]):
        audio_A = joined_audio(rows, reader, number)[: 30 * 16_000]

        assert made.seconds[SILENT + number] == len(audio_A) / 16_000
        torch.testing.assert_close(example.mel_MF, log_mel(audio_A, nano.extractor), rtol=0, atol=1e-5)


def test_a_clip_beyond_30_s_is_cut_there(nano: AsrModel, tmp_path: Path) -> None:
    # Of 16 bits, as shards hold them.
    tones = [(np.rint(make_tone(number, seconds=19.0) * 32768) / 32768).astype(np.float32) for number in range(2)]
    flacs = {f"tone-{number}.flac": encode_flac(audio_A) for number, audio_A in enumerate(tones)}
    utterances = write_shards(tmp_path, {"train-000000.tar": flacs}, seconds={"tone-0": 19.0, "tone-1": 19.0})

    with Reader(Shards(tmp_path)) as reader:
        made = make(nano, table_of([(one, response_of(3)) for one in utterances]), reader, silent=0, long=1)

    assert made.seconds.tolist() == [30.0]
    expected = log_mel(np.concatenate([tones[0], tones[1][: 11 * 16_000]]), nano.extractor)
    torch.testing.assert_close(made.examples[0].mel_MF, expected, rtol=0, atol=1e-5)


def test_responses_are_the_teachers_to_the_clip_alone_with_the_context_in_its_prompt(
    made: MadeClips, nano: AsrModel
) -> None:
    teacher = replace(nano, prompt=nano.prompt.with_context(CONTEXT))

    for example, seconds in zip(made.examples, made.seconds.tolist(), strict=True):
        limit = response_limit(seconds, max_response_tokens=MOST_TOKENS, max_tokens_per_second=25.0)
        [alone] = transcribe(teacher, [example.mel_MF], max_response_tokens=limit)
        assert tuple(example.response_ids) == (alone.token_ids if alone.ended_by == "end_token" else ())


def test_responses_are_those_of_qwen_asr(made: MadeClips, nano: AsrModel, reference: Any) -> None:
    with windows(reference):
        for number in (0, 1, 2):
            expected = reference_tokens(
                reference, nano, silent_clip(number, count=SILENT), max_new_tokens=MOST_TOKENS, context=CONTEXT
            )
            assert list(made.examples[number].response_ids) == expected


def test_a_response_that_does_not_end_is_left_out_and_its_audio_kept(
    nano: AsrModel, rows: LabelledTable, reader: Reader, made: MadeClips
) -> None:
    whole = [len(example.response_ids) for example in made.examples]
    assert min(whole) < 16 < max(whole)

    cut = make_clips(
        nano,
        rows,
        reader=reader,
        silent=SILENT,
        long=LONG,
        settings=settings_of().model_copy(update={"max_response_tokens": 16}),
    )

    assert [len(example.response_ids) for example in cut.examples] == [n if n <= 16 else 0 for n in whole]
    assert cut.num_runaway == sum(n == 0 or n > 16 for n in whole)
    assert [example.mel_MF.shape for example in cut.examples] == [example.mel_MF.shape for example in made.examples]


def test_lengths_are_those_of_the_batches(made: MadeClips) -> None:
    real = [made.batch([number]).num_tokens for number in range(len(made))]

    assert made.num_tokens.tolist() == real
    batch = made.batch([4, 0, 7])
    assert batch.num_tokens == real[4] + real[0] + real[7]
    assert batch.keys == ("silent-004", "silent-000", "long-001")
    assert batch.num_rows == sum(len(made.examples[number].response_ids) for number in (4, 0, 7))


def test_the_same_clips_are_made_every_time(nano: AsrModel, rows: LabelledTable, packed: Path, made: MadeClips) -> None:
    with Reader(Shards(packed), workers=1) as reader:
        again = make(nano, rows, reader)

    for one, other in zip(made.examples, again.examples, strict=True):
        assert one.mel_MF.numpy().tobytes() == other.mel_MF.numpy().tobytes()
        assert tuple(one.response_ids) == tuple(other.response_ids)
    assert made.seconds.tolist() == again.seconds.tolist()
    assert made.num_tokens.tolist() == again.num_tokens.tolist()


def test_nothing_is_made_or_read_where_nothing_is_wanted(nano: AsrModel, rows: LabelledTable, packed: Path) -> None:
    reader = Reader(Shards(packed))
    reader.close()  # it refuses to read

    nothing = make(nano, rows, reader, silent=0, long=0)
    silence = make(nano, rows, reader, silent=1, long=0)

    assert len(nothing) == 0
    assert [example.key for example in silence.examples] == ["silent-000"]


def test_an_utterance_that_cannot_be_read_is_named(nano: AsrModel, packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    utterances = read_utterances(packed)
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder, utterances[0])

    with Reader(Shards(folder)) as reader, pytest.raises(ShardError, match="digits-00"):
        make(nano, table_of([(utterances[0], response_of(3))]), reader, silent=0, long=1)
