"""Packed tones with responses, and their labelled sets."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qad_dist.asr.dataset import LabelledSet
from qad_dist.asr.load import AsrModel
from shards.audio import encode_flac
from shards.index import read_utterances
from shards.labelled import LabelledUtterance
from shards.read import Shards
from shards.workers import Reader
from tests.helpers.damage import spoil
from tests.helpers.labelled import response_of
from tests.helpers.labelled_sets import SAMPLES, dataset_of
from tests.helpers.reading import write_shards
from tests.helpers.tones import make_tone


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tone for each length."""
    folder = tmp_path_factory.mktemp("dataset") / "pack"
    seconds = {f"tone-{i}": samples / 16_000 for i, samples in enumerate(SAMPLES)}
    flacs = {f"{key}.flac": encode_flac(make_tone(i, seconds=seconds[key])) for i, key in enumerate(seconds)}
    shards = {f"train-00000{i}.tar": dict(list(flacs.items())[8 * i : 8 * i + 8]) for i in range(3)}
    write_shards(folder, shards, seconds=seconds)
    return folder


@pytest.fixture(scope="module")
def rows(packed: Path) -> list[LabelledUtterance]:
    return [(utterance, response_of(1 + i % 7)) for i, utterance in enumerate(read_utterances(packed))]


@pytest.fixture(scope="module")
def dataset(packed: Path, rows: list[LabelledUtterance], nano: AsrModel) -> Iterator[LabelledSet]:
    with Reader(Shards(packed)) as reader:
        yield dataset_of(rows, reader, nano)


@pytest.fixture(scope="module")
def spoilt(
    packed: Path, rows: list[LabelledUtterance], nano: AsrModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabelledSet]:
    """The same, but that the audio of rows 3 and 11 is damaged on the disk."""
    folder = Path(shutil.copytree(packed, tmp_path_factory.mktemp("spoilt") / "pack"))
    for index in (3, 11):
        spoil(folder, rows[index][0])
    with Reader(Shards(folder)) as reader:
        yield dataset_of(rows, reader, nano)
