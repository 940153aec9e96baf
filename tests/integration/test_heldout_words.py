"""Words that are got wrong on the held-out split: whose errors they are, and that ranks do not change them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
import torch.distributed as dist

from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.asr.transcribe import Request, decode
from qad_dist.config import RunConfig, load_run
from qad_dist.heldout import HeldOut
from qad_dist.heldout_words import HeldOutWords, count_heldout_words, word_error_rate, word_error_rates
from qad_dist.labelling import read_used_labels
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.world import World, current_world
from qad_dist.text.gap import describe_gap
from qad_dist.text.normalize import normalize
from shards.errors import ShardError
from shards.labelled import LabelledTable
from shards.read import Damaged
from shards.schema import HELDOUT
from tests.helpers.damage import spoil
from tests.helpers.digits import LANGUAGES, NUM_HELDOUT, DigitsRun
from tests.helpers.labelled import table_of
from tests.helpers.qwen import mels_of
from tests.helpers.ranks import run_on_ranks

CPU = torch.device("cpu")
LONGEST = 1_000
"""Tokens of any prompt with its response."""
NOISE = 0.4
"""Standard deviations of a weight: half of the words are still right."""


@pytest.fixture(scope="module")
def labelled(forks, digits: DigitsRun, tmp_path_factory) -> Callable[..., RunConfig]:
    """A run with these settings whose held-out split is labelled; made once each, to be read only."""
    torch.set_num_threads(1)
    made: dict[tuple[str, ...], RunConfig] = {}

    def label(*settings: str) -> RunConfig:
        if settings not in made:
            folder = digits.copy_to(tmp_path_factory.mktemp("labelled") / "run")
            overrides = [f"run={folder}", "label.splits=[heldout]", *settings]
            words = (word for setting in overrides for word in ("--set", setting))
            job = forks.start("label", "--config", digits.config, *words, ranks=1)
            assert [rank.code for rank in job.wait()] == [0]
            made[settings] = load_run(digits.config, overrides)
        return made[settings]

    return label


def rows_of(run: RunConfig) -> LabelledTable:
    return read_used_labels(run, HELDOUT).rows


def with_references(rows: LabelledTable, choose: Callable[[int, str | None], str | None]) -> LabelledTable:
    """The same utterances, other transcripts."""
    pairs = enumerate(rows)
    return table_of([(replace(u, reference=choose(place, u.reference)), response) for place, (u, response) in pairs])


def noisy(run: RunConfig) -> AsrModel:
    """The teacher with a decoder so much disturbed that it gets some words wrong."""
    student = load_teacher(run.model, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.decoder.layers.parameters():
            weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    return student


def counted(
    run: RunConfig, student: AsrModel, rows: LabelledTable, world: World | None = None, **damaged: Any
) -> HeldOutWords:
    with open_reader(run) as reader:
        return count_heldout_words(run, student, rows, reader, world or current_world(), **damaged)


def decoded_alone(run: RunConfig, student: AsrModel, rows: LabelledTable) -> list[str]:
    """What the student writes for each utterance with nothing beside it."""
    student = replace(student, prompt=student.prompt.with_context(run.label.context))
    texts = []
    with open_reader(run) as reader:
        for (utterance, _), audio_A in zip(rows, next(reader.ahead([list(rows.utterances)])), strict=True):
            (mel_MF,) = mels_of(student, [audio_A])
            told = utterance.language if run.label.language == "manifest" else None
            request = Request(mel_MF, run.label.max_response_tokens, told)
            texts += [found.text for _, found in decode(student, [[request]], slots=1, max_length=LONGEST)]
    return texts


def errors_of(rows: LabelledTable, texts: Sequence[str]) -> list[int]:
    """As jiwer counts them against the transcripts: in words, or in characters for Chinese."""
    found = []
    for (utterance, _), text in zip(rows, texts, strict=True):
        assert utterance.reference is not None
        pair = [normalize(one, utterance.language) for one in (utterance.reference, text)]
        if utterance.language == "Chinese":
            pair = [" ".join(one.replace(" ", "")) for one in pair]
        aligned = jiwer.process_words(*pair)
        found.append(aligned.substitutions + aligned.deletions + aligned.insertions)
    return found


def label_texts(run: RunConfig, rows: LabelledTable) -> list[str]:
    """Of the label files."""
    lines = (line for path in run.stage_folder("label").glob("*.jsonl") for line in path.read_text().splitlines())
    texts = {entry["key"]: entry["text"] for entry in map(json.loads, lines) if "key" in entry}
    return [texts[utterance.key] for utterance, _ in rows]


SETTINGS = [(), ("label.language=manifest", "label.context=zero one two three four five six seven eight nine")]


@pytest.mark.parametrize("settings", SETTINGS, ids=["automatic", "told"])
def test_errors_are_those_of_each_utterance_decoded_alone(labelled, settings: tuple[str, ...]) -> None:
    run = labelled(*settings)
    rows, student = rows_of(run), noisy(run)
    assert sorted({utterance.language for utterance, _ in rows}) == sorted(LANGUAGES)

    words = counted(run, student, rows)

    assert words.keys == tuple(utterance.key for utterance, _ in rows)
    assert words.languages == tuple(utterance.language for utterance, _ in rows)
    assert words.speakers == tuple(utterance.speaker for utterance, _ in rows)
    assert len(set(words.keys)) == NUM_HELDOUT
    errors = errors_of(rows, decoded_alone(run, student, rows))
    assert words.errors_U.tolist() == errors
    assert len(set(errors)) > 2  # so that it would be seen if two were swapped
    assert words.teacher_errors_U.tolist() == errors_of(rows, label_texts(run, rows))
    tokens = [errors_of([row], [""])[0] for row in rows]  # of an empty text all are missing
    assert words.reference_tokens_U.tolist() == tokens
    assert words.is_reference_human


@pytest.mark.parametrize("settings", SETTINGS, ids=["automatic", "told"])
def test_teacher_makes_the_errors_of_its_labels(labelled, settings: tuple[str, ...]) -> None:
    run = labelled(*settings)

    words = counted(run, load_teacher(run.model, CPU), rows_of(run))

    assert words.errors_U.tolist() == words.teacher_errors_U.tolist()


def test_without_transcripts_the_labels_are_the_references(labelled) -> None:
    run = labelled()
    rows, student = rows_of(run), noisy(run)
    texts = label_texts(run, rows)
    wanted = with_references(rows, lambda place, _: texts[place])

    words = counted(run, student, with_references(rows, lambda place, _: None))

    assert words.errors_U.tolist() == errors_of(wanted, decoded_alone(run, student, rows))
    assert words.teacher_errors_U.tolist() == [0] * NUM_HELDOUT
    assert words.reference_tokens_U.tolist() == [errors_of([row], [""])[0] for row in wanted]
    assert not words.is_human_U.any()
    assert not words.is_reference_human


def test_an_empty_transcript_is_one_and_a_missing_one_is_not(labelled) -> None:
    run = labelled()
    rows = with_references(rows_of(run), lambda place, text: None if place < 5 else "" if place == 5 else text)

    words = counted(run, load_teacher(run.model, CPU), rows)

    assert words.is_human_U.tolist() == [False] * 5 + [True] * 10
    assert not words.is_reference_human
    assert words.reference_tokens_U[5] == 0
    assert words.errors_U[5] == words.teacher_errors_U[5] > 0  # all that is heard is inserted


def test_language_that_no_source_tells_is_the_one_that_the_teacher_heard(labelled) -> None:
    run = labelled()
    rows = rows_of(run)
    untold = table_of([(replace(utterance, language=None), response) for utterance, response in rows])

    words = counted(run, load_teacher(run.model, CPU), untold)

    heard = tuple(response.language for _, response in rows)
    assert words.languages == heard
    chinese = [place for place, language in enumerate(heard) if language == "Chinese"]
    assert words.reference_tokens_U[chinese].tolist() == [errors_of([rows[place]], [""])[0] for place in chinese]
    assert min(words.reference_tokens_U[chinese]) > 1  # characters: as a word it would be one


def test_responses_are_cut_where_the_labels_would_be(labelled, digits: DigitsRun) -> None:
    run = labelled()
    short = load_run(digits.config, [f"run={run.run}", "label.max_response_tokens=8"])
    rows, teacher = rows_of(run), load_teacher(run.model, CPU)

    words = counted(short, teacher, rows)

    assert words.errors_U.tolist() == errors_of(rows, decoded_alone(short, teacher, rows))
    assert (words.errors_U > words.teacher_errors_U).any()


def by_key(words: HeldOutWords) -> dict[str, list[int]]:
    counts = np.stack([words.errors_U, words.teacher_errors_U, words.reference_tokens_U], axis=1)
    return dict(zip(words.keys, counts.tolist(), strict=True))


@pytest.fixture(scope="module")
def broken(labelled, digits: DigitsRun, tmp_path_factory) -> RunConfig:
    """The labelled run, in whose shards the fifth held-out utterance has been damaged since."""
    whole = labelled()
    folder = tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(whole.run, folder)
    run = load_run(digits.config, [f"run={folder}"])
    spoil(run.stage_folder("pack"), rows_of(whole).utterances[4])
    return run


def count_on_a_rank(rank: int, world_size: int, config: str, folder: str, expected: dict[str, list[int]]) -> None:
    assert dist.get_world_size() == world_size
    run = load_run(config, [f"run={folder}"])
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    told: list[Damaged] = []

    words = counted(run, noisy(run), rows_of(run), world, on_damaged=told.append)

    assert by_key(words) == expected
    assert sum(all_gather_objects(len(told))) == 1  # each utterance is one rank's


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_counts_as_one_does(broken, digits: DigitsRun, tmp_path, world_size: int) -> None:
    """Three are more than there are groups of utterances; one utterance cannot be read."""
    told: list[Damaged] = []
    expected = by_key(counted(broken, noisy(broken), rows_of(broken), on_damaged=told.append))
    assert len(told) == 1

    arguments = (str(digits.config), str(broken.run), expected)
    run_on_ranks(count_on_a_rank, *arguments, world_size=world_size, tmp_path=tmp_path)


def test_utterance_that_cannot_be_read_counts_nothing_and_changes_no_other(labelled, broken) -> None:
    rows, student = rows_of(broken), noisy(broken)
    key = rows.utterances[4].key
    told: list[Damaged] = []

    words = counted(broken, student, rows, on_damaged=told.append)

    assert [damaged.key for damaged in told] == [key]
    expected = by_key(counted(labelled(), student, rows))
    assert expected[key][2] > 0
    assert by_key(words) == {**expected, key: [0, 0, 0]}
    with pytest.raises(ShardError, match=key):
        counted(broken, student, rows)
    with pytest.raises(ShardError, match=r"must be readable, got none that is; verify") as error:
        counted(broken, student, rows.take([4]), on_damaged=told.append)
    assert error.value.is_shared


def test_words_and_distances_of_one_student_are_a_gap(labelled) -> None:
    """Measured in different orders, by parts that do not know each other."""
    run = labelled()
    student, teacher = noisy(run), load_teacher(run.model, CPU)
    words = counted(run, student, rows_of(run))
    with open_reader(run) as reader:
        heldout = HeldOut(run, teacher, reader, current_world(), max_utterances=NUM_HELDOUT)
    distances = heldout.distances(student)
    assert distances.keys != words.keys

    gap = describe_gap(distances, words, format="int8")

    assert gap.kl_per_token == distances.kl_per_token > 0
    assert gap.words is not None
    assert gap.words.student_rate == word_error_rate(words)
    assert gap.words.difference > 0
    assert gap.is_word_gap_real


def test_rates_are_sums_divided_once_also_of_each_language() -> None:
    words = HeldOutWords(
        keys=("a", "b", "c", "d"),
        languages=("German", "Chinese", "German", None),
        speakers=(None, "s", None, None),
        errors_U=np.array([1, 0, 0, 2]),
        teacher_errors_U=np.array([0, 0, 0, 9]),
        reference_tokens_U=np.array([1, 4, 9, 0]),
        is_human_U=np.array([True, True, True, True]),
    )

    assert word_error_rate(words) == pytest.approx(3 / 14)
    assert word_error_rates(words) == pytest.approx({"Chinese": 0.0, "German": 0.1, "unknown": 2.0})
