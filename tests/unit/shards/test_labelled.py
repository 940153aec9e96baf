"""Index, label files and verdicts joined: each utterance with its own label, and nothing stale, missing or unfit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ConfigError, ShardError
from shards.hidden import HiddenStates, hidden_path
from shards.index import UtteranceTable, read_index, read_utterances
from shards.labelled import LabelledTable, LabelledUtterance, Verdicts, better_answers, read_labelled
from shards.labels import LabelFile, LabelHeader, label_path, read_label_file, second_path, write_labels
from shards.schema import PseudoLabel, Recording, Utterance
from shards.verdicts import ALL, KL_ONLY, NOTHING, Verdict
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone

NUM_UTTERANCES = 7
LANGUAGES = ("English", "German", None)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Shards of at most 3 utterances, split train but for one of test; from 0.4 s on each 0.1 s longer."""
    recordings = []
    for number in range(NUM_UTTERANCES):
        path = tmp_path / f"{number}.wav"
        write_tone(path, number, seconds=0.4 + 0.1 * number)
        split = "test" if number == 0 else "train"
        language = "German" if number % 2 else "English"
        source = ("booth", "phone", "booth")[number % 3]
        recordings.append(Recording(path=str(path), key=f"utt-{number}", source=source, split=split, language=language))
    pack_tones(recordings, tmp_path / "pack", holdout=0, utterances_per_shard=3)
    return tmp_path / "pack"


def number_of(key: str) -> int:
    return int(key.removeprefix("utt-"))


def label_of(utterance: Utterance) -> PseudoLabel:
    """As many tokens as the number of the utterance and one; language by number."""
    number = number_of(utterance.key)
    return PseudoLabel(
        key=utterance.key,
        token_ids=(*range(number), 1017),
        text=f"number {number}",
        language=LANGUAGES[number % 3],
        prompt_language="French" if number == 4 else None,
        token_logprobs=(-0.5,) * (number + 1),
        mean_logprob=-0.5,
        ended_by="end_token",
        duration_seconds=utterance.duration_seconds,
    )


def second_of(utterance: Utterance) -> PseudoLabel:
    return replace(label_of(utterance), token_ids=(7,), token_logprobs=(-0.25,), prompt_language="German")


def states_of(labels: Sequence[PseudoLabel], *, second: int) -> np.ndarray:
    """Of each token: its utterance's number, its place, and which pass it is of."""
    rows = [(number_of(one.key), place, second) for one in labels for place in range(one.num_tokens)]
    return np.array(rows, np.uint16).reshape(-1, 3)


def label(packed: Path, folder: Path, change: Callable[[LabelHeader], LabelHeader] = lambda header: header) -> None:
    """Label files whose order is not that of the index."""
    for entry in read_index(packed).shards:
        labels = [label_of(utterance) for utterance in read_utterances(packed) if utterance.shard == entry.name][::-1]
        header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
        path = label_path(folder, entry.name)
        write_labels(path, change(header), labels, states_TD=states_of(labels, second=0))


def label_again(packed: Path, folder: Path, numbers: Sequence[int]) -> None:
    """A second pass of these utterances."""
    for entry in read_index(packed).shards:
        first = read_label_file(label_path(folder, entry.name))
        again = [u for u in read_utterances(packed) if u.shard == entry.name and number_of(u.key) in numbers]
        labels = [second_of(utterance) for utterance in again]
        header = replace(first.header, first_sha256=first.sha256)
        write_labels(second_path(folder, entry.name), header, labels, states_TD=states_of(labels, second=1))


def judge(
    uses: dict[int, str] | None = None, *, second: dict[int, str] | None = None, reasons: tuple[str, ...] = ("doubt",)
) -> Verdicts:
    """Verdicts by the number of the utterance, ``all`` where none is said."""

    def verdicts(file: LabelFile) -> list[Verdict]:
        said = (uses if file.header.first_sha256 is None else second) or {}
        found = [said.get(number_of(label.key), ALL) for label in file.labels]
        return [Verdict(use=use, reasons=() if use == ALL else reasons) for use in found]

    return verdicts


def facts_of(row: LabelledUtterance) -> tuple[object, ...]:
    utterance, response = row
    return utterance, response.token_ids.tolist(), response.language, response.prompt_language, response.ce_weight


def numbers_in(rows: LabelledTable) -> list[int]:
    return [number_of(utterance.key) for utterance, _ in rows]


def train_numbers(packed: Path) -> list[int]:
    """In the order of the index."""
    return [number_of(utterance.key) for utterance in read_utterances(packed) if utterance.split == "train"]


def test_each_utterance_of_the_split_comes_with_its_own_label_in_index_order(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    labelled = read_labelled(packed, tmp_path / "label", split="train", verdicts=judge())

    assert [utterance for utterance, _ in labelled.rows] == [u for u in read_utterances(packed) if u.split == "train"]
    for utterance, response in labelled.rows:
        expected = label_of(utterance)
        assert response.token_ids.tolist() == list(expected.token_ids)
        assert response.token_ids.dtype == np.int32
        assert (response.language, response.prompt_language) == (expected.language, expected.prompt_language)
        assert response.ce_weight == 1.0
    assert len(labelled.rows) == NUM_UTTERANCES - 1
    assert not labelled.dropped
    assert not labelled.rows.responses.is_second.any()
    assert labelled.rows.responses.ce_weights.dtype == np.float32


def test_verdicts_leave_labels_out_or_keep_their_cross_entropy_out(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    uses = {2: NOTHING, 3: KL_ONLY, 4: NOTHING, 6: KL_ONLY}
    labelled = read_labelled(
        packed, tmp_path / "label", split="train", verdicts=judge(uses, reasons=("loop", "language"))
    )

    assert sorted(numbers_in(labelled.rows)) == [1, 3, 5, 6]
    weights = {number_of(utterance.key): response.ce_weight for utterance, response in labelled.rows}
    assert weights == {1: 1.0, 3: 0.0, 5: 1.0, 6: 0.0}
    assert labelled.dropped == {"loop": 2}


def test_rows_that_are_taken_keep_what_belongs_to_them(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_again(packed, tmp_path / "label", [3])
    rows = read_labelled(
        packed, tmp_path / "label", split="train", verdicts=judge({1: KL_ONLY, 3: NOTHING}), second_pass=True
    ).rows

    order = [5, 0, 3, 0, 2]
    taken = rows.take(order)

    assert [(u, r.token_ids.tolist(), r.language, r.prompt_language, r.ce_weight) for u, r in taken] == [
        (u, r.token_ids.tolist(), r.language, r.prompt_language, r.ce_weight)
        for u, r in (rows[place] for place in order)
    ]
    for name in ("num_tokens", "hidden_starts", "is_second", "ce_weights"):
        assert getattr(taken.responses, name).tolist() == getattr(rows.responses, name)[order].tolist()
    assert len(set(rows.responses.ce_weights.tolist())) == len(set(rows.responses.is_second.tolist())) == 2


def test_utterances_beyond_the_hours_need_no_label_and_are_counted(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    numbers = train_numbers(packed)
    first = {next(n for n in numbers if n % 2 == 0), next(n for n in numbers if n % 2 == 1)}  # of each language
    for entry in read_index(packed).shards:
        file = read_label_file(label_path(tmp_path / "label", entry.name))
        kept = [one for one in file.labels if number_of(one.key) in first]
        write_labels(file.path, file.header, kept)
        if not kept:
            file.path.unlink()
    assert not label_path(tmp_path / "label", "train-000001.tar").exists()

    labelled = read_labelled(
        packed, tmp_path / "label", split="train", verdicts=judge(), max_hours_per_language=0.1 / 3600
    )

    assert set(numbers_in(labelled.rows)) == first
    assert labelled.dropped == {"not_selected": NUM_UTTERANCES - 1 - 2}
    with pytest.raises(ShardError, match="must have a label for|must be readable"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge())


def test_a_second_label_stands_for_the_first_one_where_it_is_good_for_more(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_again(packed, tmp_path / "label", [1, 2, 3, 4, 5])

    labelled = read_labelled(
        packed,
        tmp_path / "label",
        split="train",
        verdicts=judge(
            {1: NOTHING, 2: NOTHING, 3: KL_ONLY, 4: KL_ONLY, 6: NOTHING},
            second={1: KL_ONLY, 2: NOTHING, 4: KL_ONLY},
        ),
        second_pass=True,
    )

    found = {
        number_of(utterance.key): (len(response.token_ids), response.prompt_language, response.ce_weight)
        for utterance, response in labelled.rows
    }
    # 1 and 3 from the second pass; 4 is no better there, and 5 was good at once.
    assert found == {1: (1, "German", 0.0), 3: (1, "German", 1.0), 4: (5, "French", 0.0), 5: (6, None, 1.0)}
    assert labelled.dropped == {"doubt": 2}
    assert [numbers_in(labelled.rows)[row] for row in np.flatnonzero(labelled.rows.responses.is_second)] == [
        number for number in numbers_in(labelled.rows) if number in (1, 3)
    ]


def test_answers_keep_the_order_of_the_first_labels(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_again(packed, tmp_path / "label", [1, 2, 3, 4, 5, 6])
    path = label_path(tmp_path / "label", "train-000001.tar")
    first = read_label_file(path)
    second = read_label_file(second_path(tmp_path / "label", "train-000001.tar"), first_sha256=first.sha256)
    doubted, good = first.labels[1], first.labels[0]

    answers = better_answers(first, second, judge({number_of(doubted.key): KL_ONLY}))

    assert list(answers) == [one.key for one in first.labels]
    assert answers[good.key] == (good, Verdict(use=ALL), 0, False)
    [place] = [place for place, one in enumerate(second.labels) if one.key == doubted.key]
    assert answers[doubted.key] == (second.labels[place], Verdict(use=ALL), place, True)
    assert list(better_answers(first, None, judge()).values()) == [
        (one, Verdict(use=ALL), sum(before.num_tokens for before in first.labels[:place]), False)
        for place, one in enumerate(first.labels)
    ]


def test_second_labels_are_not_looked_at_unless_there_is_a_second_pass(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_again(packed, tmp_path / "label", [1])
    verdicts = judge({1: NOTHING})

    assert 1 not in numbers_in(read_labelled(packed, tmp_path / "label", split="train", verdicts=verdicts).rows)


def test_a_second_pass_of_other_labels_is_refused(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    with pytest.raises(ShardError, match=r"train-00000\d\.second\.jsonl must be readable, got .*; run the label stage"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge(), second_pass=True)

    label_again(packed, tmp_path / "label", [1])
    label(packed, tmp_path / "label", lambda header: replace(header, teacher="another"))
    with pytest.raises(ShardError, match=r"second\.jsonl must hold a second pass of \w{12}, got one of \w{12}; label"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge(), second_pass=True)


def test_a_second_label_without_a_first_one_is_refused(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_again(packed, tmp_path / "label", [])
    path = second_path(tmp_path / "label", "train-000000.tar")
    first_sha256 = read_label_file(label_path(tmp_path / "label", "train-000000.tar")).sha256
    other = next(u for u in read_utterances(packed) if u.shard != "train-000000.tar")
    write_labels(path, read_label_file(path, first_sha256=first_sha256).header, [second_of(other)])

    message = (
        rf"second\.jsonl must label utterances of train-000000\.jsonl, got '{other.key}'; delete it and label again"
    )
    with pytest.raises(ShardError, match=message):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge(), second_pass=True)


def test_hidden_starts_lead_to_the_states_of_each_response(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_again(packed, tmp_path / "label", [1, 2, 5])

    rows = read_labelled(
        packed, tmp_path / "label", split="train", verdicts=judge({2: NOTHING, 5: KL_ONLY}), second_pass=True
    ).rows

    assert rows.responses.is_second.sum() == 2
    for row, (utterance, response) in enumerate(rows):
        first = file = read_label_file(label_path(tmp_path / "label", utterance.shard))
        if is_second := bool(rows.responses.is_second[row]):
            path = second_path(tmp_path / "label", utterance.shard)
            file = read_label_file(path, first_sha256=first.sha256)
        assert file.header.hidden is not None
        states = HiddenStates(hidden_path(file.path), file.header.hidden, num_tokens=file.num_tokens)
        found = states.rows(int(rows.responses.hidden_starts[row]), len(response.token_ids))
        number = number_of(utterance.key)
        assert found.tolist() == [[number, place, is_second] for place in range(len(response.token_ids))]


def test_labels_of_another_shard_are_refused(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label", lambda header: replace(header, shard_sha256="0" * 64))

    with pytest.raises(ShardError, match="must label the shard that is in the index, got another one; label again"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge())


def test_missing_label_file_is_named(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_path(tmp_path / "label", "train-000001.tar").unlink()

    with pytest.raises(ShardError, match=r"train-000001\.jsonl must be readable, got .*; run the label stage"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge())


def test_utterance_without_a_label_is_named(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    entry = next(entry for entry in read_index(packed).shards if entry.name == "train-000000.tar")
    header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
    write_labels(label_path(tmp_path / "label", entry.name), header, [])

    with pytest.raises(ShardError, match=r"train-000000\.jsonl must have a label for 'utt-\d', got none"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=judge())


def test_verdicts_on_fewer_labels_are_our_mistake(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    with pytest.raises(ValueError, match="shorter"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=lambda file: judge()(file)[1:])


def test_split_without_usable_labels_is_refused_with_the_reasons(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    nothing = judge(dict.fromkeys(range(NUM_UTTERANCES), NOTHING), reasons=("no_text",))

    with pytest.raises(ShardError, match=r"must hold usable labels of the split 'train', got 0 \(.*'no_text': 6"):
        read_labelled(packed, tmp_path / "label", split="train", verdicts=nothing)
    with pytest.raises(ShardError, match="usable labels of the split 'heldout', got 0"):
        read_labelled(packed, tmp_path / "label", split="heldout", verdicts=judge())


def test_the_table_takes_no_utterance_of_another_split(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    labelled = read_labelled(packed, tmp_path / "label", split="test", verdicts=judge())

    assert isinstance(labelled.rows.utterances, UtteranceTable)
    assert numbers_in(labelled.rows) == [0]


def test_rows_of_sources_are_those_that_the_index_says(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    rows = read_labelled(packed, tmp_path / "label", split="train", verdicts=judge()).rows

    phone = rows.take(rows.utterances.places_of(["phone"], setting="x.sources"))
    both = rows.take(rows.utterances.places_of(("booth", "phone"), setting="x.sources"))

    assert sorted(numbers_in(phone)) == [1, 4]
    assert [facts_of(row) for row in phone] == [facts_of(row) for row in rows if number_of(row[0].key) in (1, 4)]
    assert numbers_in(both) == numbers_in(rows)
    with pytest.raises(ConfigError, match=r"x\.sources must be sources of this speech \(booth, phone\), got car"):
        rows.utterances.places_of(["phone", "car"], setting="x.sources")
