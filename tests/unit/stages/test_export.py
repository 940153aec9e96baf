"""What export compares on, and what it tells the user."""

import ast
import copy
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qad_dist.asr.load import AsrModel, state_hash
from qad_dist.asr.transcribe import Hypothesis
from qad_dist.config import RunConfig
from qad_dist.stages import export
from qad_dist.stages.export import _dtype, _utterances, export_folder, run, usage
from shards.errors import ModelError, WorldError
from shards.schema import ENDED_BY_LENGTH, Recording
from tests.helpers.packing import pack_tones
from tests.helpers.quantized import INT8
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


@pytest.mark.parametrize("name", ["run", "O'Brien $HOME `id`/r\\un", 'a "b" c', "Ünï 🎤"])
def test_usage_is_one_command_that_names_the_folder(tmp_path: Path, name: str) -> None:
    folder = export_folder(run_of(tmp_path / name))
    assert folder == tmp_path / name / "export" / "modelopt"

    (line,) = [line for line in usage(folder).splitlines() if "python" in line]

    python, option, program = shlex.split(line)  # as a shell reads it
    assert (python, option) == ("python", "-c")
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)}
    (argument,) = calls["Qwen3ASRModel.from_pretrained"].args
    assert ast.literal_eval(argument) == str(folder)
    assert program.index("enable_huggingface_checkpointing()") < program.index("from_pretrained")


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Compare what the student said with a fresh process that found the same, but for what is changed."""

    def compare(**changes: Any) -> dict[str, Any]:
        expected = {
            "quantizers": 42,
            "quantizer_sha256": "q",
            "state_sha256": "s",
            "answers": [["u", [5, 6], [-0.25, -0.5]]],
        }
        found = {
            **{name: changes.pop(name, value) for name, value in copy.deepcopy(expected).items()},
            **{"qwen_asr_quantizers": 42, "qwen_asr_state_sha256": "s", "qwen_asr_text": "x", "int8": None, **changes},
        }
        monkeypatch.setattr(export, "_in_fresh_process", lambda *_: found)
        return export._check(run_of(tmp_path), expected, tmp_path / "export")

    return compare


def test_equal_answers_pass_and_are_counted(compared: Callable[..., dict[str, Any]]) -> None:
    results = compared(answers=[["u", [5, 6], [-0.26, -0.5]]])  # rounded otherwise

    assert (results["equal_transcripts"], results["quantizers"], results["state_sha256"]) == (1, 42, "s")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"qwen_asr_state_sha256": "other"}, "the qwen_asr_state_sha256 of the trained student, got other for s"),
        ({"state_sha256": "other"}, "the state_sha256 of the trained student, got other for s"),
        ({"quantizer_sha256": "other"}, "the quantizer_sha256 of the trained student, got other for q"),
        ({"qwen_asr_quantizers": 0}, "the qwen_asr_quantizers of the trained student, got 0 for 42"),
        ({"answers": [["u", [5, 7], [-0.25, -0.5]]]}, "the tokens of u of the trained student, got others"),
        ({"answers": [["u", [5], [-0.25]]]}, "the tokens of u of the trained student, got others"),
        ({"answers": [["u", [5, 6], [-0.25, -0.6]]]}, "the log-probabilities of u of .*, got some 0.1 apart"),
    ],
)
def test_difference_from_the_student_is_named(
    compared: Callable[..., dict[str, Any]], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError, match=rf"export must have {told} in a fresh process"):
        compared(**changes)


def test_head_of_random_numbers_in_qwen_asr_shows_in_the_hash(tmp_path: Path) -> None:
    """As it is made where the config ties none and none is stored: quantizers and other weights are all right."""
    weights = {"embedding": torch.ones(3, 2, dtype=torch.bfloat16), "head": torch.ones(3, 2, dtype=torch.bfloat16)}
    hashes = set()
    for head in (weights["head"], torch.zeros(3, 2, dtype=torch.bfloat16), weights["head"].float()):
        module = torch.nn.Module()
        module.embedding, module.head = torch.nn.Parameter(weights["embedding"]), torch.nn.Parameter(head)
        module.register_buffer("scale", torch.tensor(2.0))
        hashes.add(state_hash(module))

    assert len(hashes) == 3


def test_log_probabilities_that_are_no_numbers_are_refused(
    tmp_path: Path, nano: AsrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_splits(tmp_path, ["test"])
    run_config = run_of(tmp_path / "run")
    said = Hypothesis((5,), (math.nan,), "x", None, ENDED_BY_LENGTH)
    monkeypatch.setattr(export, "transcribe", lambda *_, **__: [said])

    with pytest.raises(ModelError, match=r"must give finite log-probabilities, got some for tone-0 that are not"):
        export._answers(nano, INT8, run_config, _utterances(run_config))


def test_failure_of_the_fresh_process_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "export" / "verify.log"
    log.parent.mkdir()
    monkeypatch.setattr(export, "_PROGRAM", "import sys; print('first', file=sys.stderr); sys.exit('and last')")

    with pytest.raises(ModelError, match=rf"must load in a fresh process, got: and last; see {log}"):
        export._in_fresh_process(run_of(tmp_path), tmp_path / "folder", [])

    assert log.read_text() == "first\nand last\n"


def test_fresh_process_that_never_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "export").mkdir()
    monkeypatch.setattr(export, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(export, "FRESH_PROCESS_SECONDS", 0.5)

    with pytest.raises(ModelError, match=r"must load and answer in a fresh process within 0\.5 s, got no end; see "):
        export._in_fresh_process(run_of(tmp_path), tmp_path / "folder", [])


def test_export_on_several_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)

    with pytest.raises(WorldError, match=r"export runs as one process, got 2; start it with `python launch"):
        run(run_of(tmp_path))
