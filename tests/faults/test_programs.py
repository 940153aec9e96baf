"""Bad input on the real programs: one line that names setting or file, value, rule and remedy; nothing published."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.digits import TEACHER, DigitsRun, FinishedRun
from tests.helpers.launching import launch, run_python


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and what is told of it."""

    program: str
    line: str
    """How the one line begins; ``{run}`` is the run's folder, ``{folder}`` that of the prepared files."""
    remedy: str
    """How it ends."""
    prepare: Callable[["Bench", Path], list[str]]
    """Given the run's folder, breaks something and returns settings."""
    stages: tuple[str, ...] = ()
    """Finished before."""
    left: tuple[str, ...] = ()
    """What the stage leaves in its folder: whole files from which another start goes on."""
    run: str = ""
    """Below the case's folder; by default its name."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What cases are made of."""

    folder: Path
    manifest: Path

    def write_manifest(self, name: str, *, count: int, audio: Path | None = None) -> Path:
        """The first entries of the manifest, and one more with this audio file."""
        entries = [json.loads(line) for line in self.manifest.read_text(encoding="utf-8").splitlines()]
        chosen = entries[:count] + ([{**entries[count], "key": audio.stem, "audio": str(audio)}] if audio else [])
        path = self.folder / name
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in chosen), encoding="utf-8")
        return path


def nothing(bench: Bench, run: Path) -> list[str]:
    return []


def setting(text: str) -> Callable[[Bench, Path], list[str]]:
    return lambda bench, run: [text.format(folder=bench.folder)]


def unreadable_audio(bench: Bench, run: Path) -> list[str]:
    audio = bench.folder / "bad.wav"
    audio.write_text("this is no audio")
    return [f"pack.inputs=[{bench.write_manifest('unreadable.jsonl', count=8, audio=audio)}]"]


def missing_audio(bench: Bench, run: Path) -> list[str]:
    audio = bench.folder / "gone.wav"
    return [f"pack.inputs=[{bench.write_manifest('missing.jsonl', count=8, audio=audio)}]"]


def empty_manifest(bench: Bench, run: Path) -> list[str]:
    return [f"pack.inputs=[{bench.write_manifest('empty.jsonl', count=0)}]"]


def other_architecture(bench: Bench, run: Path) -> list[str]:
    folder = bench.folder / "qwen3"
    shutil.copytree(TEACHER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    return [f"model.path={folder}"]


def quantized_teacher(bench: Bench, run: Path) -> list[str]:
    folder = bench.folder / "quantized"
    shutil.copytree(TEACHER, folder)
    (folder / "modelopt_state.pth").write_bytes(b"")
    return [f"model.path={folder}"]


def file_for_run_folder(bench: Bench, run: Path) -> list[str]:
    (bench.folder / "file").write_text("")
    return []


def file_for_stage_folder(bench: Bench, run: Path) -> list[str]:
    (run / "score").write_text("")
    return []


def flip_bit(name: str) -> Callable[[Bench, Path], list[str]]:
    def flip(bench: Bench, run: Path) -> list[str]:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 4
        (run / name).write_bytes(content)
        return []

    return flip


def cut(name: str) -> Callable[[Bench, Path], list[str]]:
    def cut_in_half(bench: Bench, run: Path) -> list[str]:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
        return []

    return cut_in_half


def remove(name: str) -> Callable[[Bench, Path], list[str]]:
    def unlink(bench: Bench, run: Path) -> list[str]:
        (run / name).unlink()
        return []

    return unlink


# Other shards may have been labelled before.
ALL_BUT_0 = ("claims", "heldout-*", "train-00000[!0].*")
LABEL_FIRST = "run `accelerate launch launch/label.py --config ...` first"
QUANTIZE_FIRST = "run `accelerate launch launch/quantize.py --config ...` first"
TRAIN_FIRST = "run `accelerate launch launch/train.py --config ...` first"
NOT_FINISHED = "must be finished before this stage, got no done.json; "

FAULTS = {
    "label without pack": Fault(
        "label", "{run}/pack " + NOT_FINISHED, "run `python launch/pack.py --config ...` first", nothing
    ),
    "quantize without label": Fault("quantize", "{run}/label " + NOT_FINISHED, LABEL_FIRST, nothing, ("pack",)),
    "train without quantize": Fault(
        "train", "{run}/quantize " + NOT_FINISHED, QUANTIZE_FIRST, nothing, ("pack", "label")
    ),
    "score without train": Fault(
        "score", "{run}/train " + NOT_FINISHED, TRAIN_FIRST, nothing, ("pack", "label", "quantize")
    ),
    "export without train": Fault(
        "export", "{run}/train " + NOT_FINISHED, TRAIN_FIRST, nothing, ("pack", "label", "quantize")
    ),
    "unreadable audio": Fault(
        "pack",
        "pack.max_rejected_share must cover what is rejected, got 0.05 and 1 of 9 recordings: ",
        "bad (unreadable: Format not recognised); see {run}/pack/rejected.jsonl, mend them or raise it",
        unreadable_audio,
        left=("rejected.jsonl", "*.tar", "*.part.json", "tasks.*"),  # by these it goes on
    ),
    "missing audio": Fault(
        "pack",
        "pack.max_rejected_share must cover what is rejected, got 0.05 and 1 of 9 recordings: ",
        "gone (unreadable: No such file or directory); see {run}/pack/rejected.jsonl, mend them or raise it",
        missing_audio,
        left=("rejected.jsonl", "*.tar", "*.part.json", "tasks.*"),  # by these it goes on
    ),
    "empty manifest": Fault(
        "pack",
        "pack.inputs must each hold recordings, got none in '{folder}/empty.jsonl'; ",
        "remove it or fill it",
        empty_manifest,
    ),
    "no manifest": Fault(
        "pack",
        "pack.inputs must each be a source (folder, qwen, nemo, lhotse, kaldi, librispeech, vivos, common_voice, "
        "fleurs, parquet, nemo_tarred, lhotse_shar, webdataset), got '{folder}/no.jsonl' ",
        "write a manifest or mend the path",
        setting("pack.inputs=[{folder}/no.jsonl]"),
    ),
    "run folder below a file": Fault(
        "pack",
        "{run}/pack/corpus.arrow must be writable, got 'Not a directory'; ",
        "choose another run folder or mend its permissions",
        file_for_run_folder,
        run="file/run",
    ),
    "file in place of the stage's folder": Fault(
        "score",
        "{run}/score/.writable must be writable, got 'File exists'; ",
        "choose another run folder or mend its permissions",
        file_for_stage_folder,
        ("pack", "label", "quantize", "train"),
    ),
    "no model folder": Fault(
        "label",
        "model.path must be a folder with config.json, got '{folder}/no-model'; ",
        "name a Qwen3-ASR checkpoint",
        setting("model.path={folder}/no-model"),
        ("pack",),
    ),
    "folder without a model": Fault(
        "label",
        "model.path must be a folder with config.json, got '{folder}'; ",
        "name a Qwen3-ASR checkpoint",
        setting("model.path={folder}"),
        ("pack",),
    ),
    "model of another architecture": Fault(
        "label",
        "{folder}/qwen3/config.json must name model_type 'qwen3_asr', got 'qwen3'; ",
        "name another folder",
        other_architecture,
        ("pack",),
    ),
    "quantized teacher": Fault(
        "label",
        "{folder}/quantized must have no modelopt_state.pth here, got such file; ",
        "name a full-precision checkpoint",
        quantized_teacher,
        ("pack",),
    ),
    "unknown system to score": Fault(
        "score",
        "score.systems.other must be a folder with config.json, got '{folder}/no-model'; ",
        "name a Qwen3-ASR checkpoint",
        setting("score.systems={{other: {folder}/no-model}}"),
        ("pack", "label", "quantize", "train"),
    ),
    "seed changed after pack": Fault(
        "label",
        "{run}/pack must be made with this config, got other values of seed; ",
        "run `python launch/pack.py --config ...` again or undo the change",
        setting("seed=5"),
        ("pack",),
    ),
    "flipped bit in a shard": Fault(
        "label",
        "read.max_quarantined_share must cover what cannot be read, got 0.01 (at most 0 of 55 utterances) and 1: ",
        "; the shard is damaged, pack again); see {run}/label, mend the shards or raise it",
        flip_bit("pack/train-000000.tar"),
        ("pack",),
        left=ALL_BUT_0,
    ),
    "shard cut in half": Fault(
        "label",
        "read.max_quarantined_share must cover what cannot be read, got 0.01 (at most 0 of 55 utterances) and 4: ",
        "; the shard was cut, pack again); see {run}/label, mend the shards or raise it",
        cut("pack/train-000001.tar"),
        ("pack",),
        left=("claims", "heldout-*", "train-00000[!1].*"),
    ),
    "shard missing": Fault(
        "label",
        "{run}/pack/train-000000.tar must be readable, got 'No such file or directory'; ",
        "pack again or mend the disk",
        remove("pack/train-000000.tar"),
        ("pack",),
        left=ALL_BUT_0,
    ),
    "label file missing": Fault(
        "quantize",
        "{run}/label/train-000003.jsonl must be readable, got 'No such file or directory'; ",
        "run the label stage",
        remove("label/train-000003.jsonl"),
        ("pack", "label"),
    ),
    "label file cut in half": Fault(
        "quantize",
        "{run}/label/train-000003.jsonl must hold 8 labels, got ",
        "delete it and label again",
        cut("label/train-000003.jsonl"),
        ("pack", "label"),
    ),
    "flipped bit in the quantized student": Fault(
        "train",
        "{run}/quantize/student/model.safetensors must have sha256 ",
        "it is damaged, use another one",
        flip_bit("quantize/student/model.safetensors"),
        ("pack", "label", "quantize"),
    ),
    "quantizers missing from the student": Fault(
        "train",
        "{run}/quantize/student/modelopt_state.pth must have ",
        " bytes, got no file; use another checkpoint",
        remove("quantize/student/modelopt_state.pth"),
        ("pack", "label", "quantize"),
    ),
    "flipped bit in the trained student": Fault(
        "export",
        "{run}/train/student/model.safetensors must have sha256 ",
        "it is damaged, use another one",
        flip_bit("train/student/model.safetensors"),
        ("pack", "label", "quantize", "train"),
    ),
    "trained student scored with a flipped bit": Fault(
        "score",
        "{run}/train/student/model.safetensors must have sha256 ",
        "it is damaged, use another one",
        flip_bit("train/student/model.safetensors"),
        ("pack", "label", "quantize", "train"),
    ),
    "no DeepSpeed settings": Fault(
        "train",
        "train.deepspeed must be a DeepSpeed JSON file, got 'none.json' ",
        "see configs/deepspeed",
        setting("train.deepspeed=none.json"),
        ("pack", "label", "quantize"),
    ),
}


@dataclass(frozen=True, slots=True)
class Told:
    """How a case ended."""

    code: int
    stdout: str
    stderr: str
    run: Path
    folder: Path


@pytest.fixture(scope="module")
def told(digits: DigitsRun, two_rank_run: FinishedRun, tmp_path_factory) -> dict[str, Told]:
    """All cases, run by one process, each on a run folder of its own."""
    folder = tmp_path_factory.mktemp("faults")
    commands, places = [], []
    for number, fault in enumerate(FAULTS.values()):
        bench = Bench(folder / str(number), digits.manifest)
        bench.folder.mkdir()
        run = bench.folder / (fault.run or "run")
        two_rank_run.copy_to(run, *fault.stages)
        settings = fault.prepare(bench, run)
        commands.append([fault.program, "--config", str(digits.config), "--set", f"run={run}", *settings])
        places.append((run, bench.folder))
    (folder / "commands.json").write_text(json.dumps(commands))
    arguments = ["tests/helpers/run_programs.py", folder / "commands.json", folder / "answers.json"]
    ended = run_python(*arguments, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    answers = json.loads((folder / "answers.json").read_text())
    return {
        name: Told(**answer, run=run, folder=place)
        for name, answer, (run, place) in zip(FAULTS, answers, places, strict=True)
    }


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_is_told_in_one_line_with_rule_value_and_remedy(told, name):
    fault, ended = FAULTS[name], told[name]
    places = {"run": ended.run, "folder": ended.folder}
    lines = [line for line in ended.stderr.splitlines() if " INFO " not in line]

    assert ended.code == 1
    assert ended.stdout == ""
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith(fault.line.format(**places))
    assert lines[0].endswith(fault.remedy.format(**places))
    assert "; " in lines[0]


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_leaves_nothing_unfinished_under_a_final_name(told, name):
    fault, ended = FAULTS[name], told[name]
    folder = ended.run / fault.program
    files = [str(path.relative_to(folder)) for path in folder.rglob("*")] if folder.is_dir() else []

    unexpected = [file for file in files if not any(Path(file).match(pattern) for pattern in fault.left)]
    assert unexpected == []
    assert {Path(file).name for file in files}.isdisjoint({"done.json", "index.json", "utterances.parquet"})


def test_more_ranks_than_utterances_is_told_once(digits, tmp_path):
    bench = Bench(tmp_path, digits.manifest)
    inputs = f"pack.inputs=[{bench.write_manifest('one.jsonl', count=1)}]"
    arguments = ["--config", digits.config, "--set", f"run={tmp_path}/run", inputs]
    packed = run_python("launch/pack.py", *arguments, folder=tmp_path / "output")

    ended = launch("launch/label.py", *arguments, ranks=2, folder=tmp_path / "output")

    line = "label needs at least one utterance for each rank, got 1 for 2 ranks; start fewer with --num_processes\n"
    assert packed.code == 0, packed.stderr
    assert ended.code == 1
    assert ended.stderr.count(line) == 1
    assert "Traceback" not in ended.stderr.partition(line)[0]
    assert not (tmp_path / "run" / "label").exists()
