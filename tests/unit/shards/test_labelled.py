"""Index and label files joined: each utterance with its own label, and nothing stale, missing or unfit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ShardError
from shards.index import read_index, read_utterances
from shards.labelled import read_labelled
from shards.labels import LabelHeader, label_path, write_labels
from shards.schema import PseudoLabel, Recording, Utterance
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone

NUM_UTTERANCES = 7


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Shards of at most 3 utterances, split train but for one of test."""
    recordings = []
    for number in range(NUM_UTTERANCES):
        path = tmp_path / f"{number}.wav"
        write_tone(path, number)
        split = "test" if number == 0 else "train"
        recordings.append(Recording(path=str(path), key=f"utt-{number}", source="tones", split=split))
    pack_tones(recordings, tmp_path / "pack", holdout=0, utterances_per_shard=3)
    return tmp_path / "pack"


def label_of(utterance: Utterance) -> PseudoLabel:
    number = int(utterance.key.removeprefix("utt-"))
    return PseudoLabel(
        key=utterance.key,
        token_ids=(number, 1017),
        text=f"number {number}",
        language="English",
        token_logprobs=(-0.5, -0.25),
        mean_logprob=-0.375,
        ended_by="end_token",
        duration_seconds=utterance.duration_seconds,
    )


def label(packed: Path, folder: Path, change: Callable[[LabelHeader], LabelHeader] = lambda header: header) -> None:
    for entry in read_index(packed).shards:
        labels = [label_of(utterance) for utterance in read_utterances(packed) if utterance.shard == entry.name]
        header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
        write_labels(label_path(folder, entry.name), change(header), labels[::-1])


def keep_all(_: PseudoLabel) -> None:
    return None


def test_each_utterance_of_the_split_comes_with_its_own_label_in_index_order(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    labelled = read_labelled(packed, tmp_path / "label", split="train", reject=keep_all)

    assert [utterance for utterance, _ in labelled.rows] == [u for u in read_utterances(packed) if u.split == "train"]
    for utterance, response in labelled.rows:
        assert response.token_ids.tolist() == list(label_of(utterance).token_ids)
        assert (response.token_ids.dtype, response.language) == (np.int32, "English")
    assert len(labelled.rows) == NUM_UTTERANCES - 1
    assert not labelled.dropped


def test_rejected_labels_are_left_out_and_counted_by_reason(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    def reject(found: PseudoLabel) -> str | None:
        return "even" if found.token_ids[0] % 2 == 0 else None

    labelled = read_labelled(packed, tmp_path / "label", split="train", reject=reject)

    assert sorted(utterance.key for utterance, _ in labelled.rows) == ["utt-1", "utt-3", "utt-5"]
    assert labelled.dropped == {"even": 3}


def test_labels_of_another_shard_are_refused(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label", lambda header: replace(header, shard_sha256="0" * 64))

    with pytest.raises(ShardError, match="must label the shard that is in the index, got another one; label again"):
        read_labelled(packed, tmp_path / "label", split="train", reject=keep_all)


def test_missing_label_file_is_named(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    label_path(tmp_path / "label", "train-000001.tar").unlink()

    with pytest.raises(ShardError, match=r"train-000001\.jsonl must be readable, got .*; run the label stage"):
        read_labelled(packed, tmp_path / "label", split="train", reject=keep_all)


def test_utterance_without_a_label_is_named(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")
    entry = next(entry for entry in read_index(packed).shards if entry.name == "train-000000.tar")
    header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
    write_labels(label_path(tmp_path / "label", entry.name), header, [])

    with pytest.raises(ShardError, match=r"train-000000\.jsonl must have a label for 'utt-\d', got none"):
        read_labelled(packed, tmp_path / "label", split="train", reject=keep_all)


def test_split_without_usable_labels_is_refused_with_the_reasons(packed: Path, tmp_path: Path) -> None:
    label(packed, tmp_path / "label")

    with pytest.raises(ShardError, match=r"must hold usable labels of the split 'train', got 0 \(.*'no_text': 6"):
        read_labelled(packed, tmp_path / "label", split="train", reject=lambda _: "no_text")
    with pytest.raises(ShardError, match="usable labels of the split 'heldout', got 0"):
        read_labelled(packed, tmp_path / "label", split="heldout", reject=keep_all)
