"""Runs that only have test sets, and the corpora that these are."""

from pathlib import Path
from typing import Any

from qad_dist.config import RunConfig
from qad_dist.runtime.reading import open_reader
from qad_dist.test_sets import TestSet, open_test_sets, prepare_test_sets
from tests.helpers.corpora import write_lines
from tests.helpers.tones import number_of, write_tone

CORPUS = "LibriSpeech"


def make_mini_librispeech(root: Path) -> Path:
    """Two utterances of the set, and one each of a training split and of the set that is called almost the same."""
    splits = {"dev-clean-2": ("1272", ["0000", "0001"]), "dev-clean": ("84", ["0000"]), "train-clean-5": ("19", ["9"])}
    number = 0
    for split, (speaker, names) in splits.items():
        chapter = root / CORPUS / split / speaker / "128104"
        for name in names:
            write_tone(chapter / f"{speaker}-128104-{name}.flac", number)
            number += 1
        write_lines(
            chapter / f"{speaker}-128104.trans.txt", *(f"{speaker}-128104-{name} {split} {name}" for name in names)
        )
    return root


def make_set(folder: Path, *rows: dict[str, Any]) -> Path:
    """A manifest with a tone of 0.4 s for each row, whose name is its number."""
    for number in range(len(rows)):
        write_tone(folder / f"{number}.wav", number)
    lines = [{"audio": f"{number}.wav", **row} for number, row in enumerate(rows)]
    return write_lines(folder / "m.jsonl", *lines)


def run_of(
    folder: Path, sets: dict[str, Any], *, seed: int = 0, pack: dict[str, Any] | None = None, **score: Any
) -> RunConfig:
    """A run of these test sets, without one of its own."""
    return RunConfig.model_validate(
        {
            **{"run": str(folder / "run"), "seed": seed, "model": {"path": "unused"}, "read": {"workers": 0}},
            "pack": {"inputs": ["unused"], "processes": 1, **(pack or {})},
            "score": {"splits": [], "sets": sets, **score},
        }
    )


def opened(run: RunConfig) -> list[TestSet]:
    """The sets of a run, packed first where they are not yet."""
    prepare_test_sets(run)
    return open_test_sets(run)


def tones_of(run: RunConfig, test_set: TestSet) -> list[int]:
    """The numbers of the tones that the utterances of a set are."""
    with open_reader(run, test_set.folder) as reader:
        return [number_of(codes) for codes in reader.read(list(test_set.utterances))]
