"""What export compares on, and what it tells the user."""

from pathlib import Path

import pytest

from qad_dist.config import RunConfig
from qad_dist.stages.export import _dtype, _utterances, export_folder, run, usage
from shards.errors import WorldError
from shards.schema import Recording
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone


def run_of(folder: Path, *, verify_utterances: int = 3, dtype: str | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(folder),
            "model": {"path": "unused", "dtype": "bfloat16"},
            "pack": {"inputs": ["unused"]},
            "export": {"verify_utterances": verify_utterances, "dtype": dtype},
        }
    )


def pack_splits(folder: Path, splits: list[str]) -> None:
    """Tones of rising length, one for each split named."""
    recordings = [
        Recording(
            path=str(write_tone(folder / "audio" / f"{i}.wav", i, seconds=0.2 + 0.01 * i)),
            key=f"tone-{i}",
            source="tones",
            split=split,
        )
        for i, split in enumerate(splits)
    ]
    pack_tones(recordings, folder / "run" / "pack", holdout=0)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(1, [0]), (2, [0, 9]), (3, [0, 4, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))],
)
def test_utterances_to_compare_on_span_the_durations(tmp_path: Path, wanted: int, expected: list[int]) -> None:
    pack_splits(tmp_path, ["test"] * 10)

    chosen = _utterances(run_of(tmp_path / "run", verify_utterances=wanted))

    assert [utterance.key for utterance in chosen] == [f"tone-{i}" for i in expected]


def test_test_split_is_compared_on_where_there_is_one(tmp_path: Path) -> None:
    pack_splits(tmp_path, ["train", "test", "train", "dev", "test"])

    chosen = _utterances(run_of(tmp_path / "run", verify_utterances=9))

    assert [utterance.key for utterance in chosen] == ["tone-1", "tone-4"]


def test_any_split_is_compared_on_where_nothing_was_packed_to_test(tmp_path: Path) -> None:
    pack_splits(tmp_path, ["train", "dev", "train"])

    assert len(_utterances(run_of(tmp_path / "run", verify_utterances=9))) == 3


def test_export_keeps_the_runs_dtype_unless_told_otherwise(tmp_path: Path) -> None:
    assert _dtype(run_of(tmp_path)) == "bfloat16"
    assert _dtype(run_of(tmp_path, dtype="float16")) == "float16"


def test_usage_is_one_line_of_python_that_names_the_folder(tmp_path: Path) -> None:
    folder = export_folder(run_of(tmp_path / "run"))
    assert folder == tmp_path / "run" / "export" / "modelopt"

    (command,) = [line.strip() for line in usage(folder).splitlines() if "python" in line]

    program = command.removeprefix('python -c "').removesuffix('"')
    compile(program, "usage", "exec")
    assert '"' not in program  # it stands between double quotes in a shell
    assert f"from_pretrained('{folder}')" in program
    assert program.index("enable_huggingface_checkpointing()") < program.index("from_pretrained")


def test_export_on_several_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)

    with pytest.raises(WorldError, match=r"export runs as one process, got 2; start it with `python launch"):
        run(run_of(tmp_path))
