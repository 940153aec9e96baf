"""The command line that all programs share: what is called, what is printed, and with which exit code."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qad_dist.config import RunConfig, load_run
from qad_dist.runtime import program
from qad_dist.runtime.program import run_program
from shards.errors import ModelError


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {tmp_path}/run\nmodel: {{path: m}}\npack: {{inputs: [a]}}\n")
    return str(path)


class Calls:
    """Remembers which command was called with which config."""

    def __init__(self) -> None:
        self.made: list[tuple[str, RunConfig]] = []

    def named(self, name: str):
        return lambda run: self.made.append((name, run))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]


@pytest.fixture
def calls() -> Calls:
    return Calls()


def start(calls: Calls, *arguments: str) -> int:
    commands = {"run": calls.named("run"), "verify": calls.named("verify")}
    return run_program("Says what it does.", commands, dry_run=calls.named("dry_run"), arguments=arguments)


@pytest.mark.parametrize(
    ("words", "called"),
    [
        ([], "run"),
        (["run"], "run"),
        (["verify"], "verify"),
        (["--dry-run"], "dry_run"),
        (["verify", "--set", "seed=3"], "verify"),
    ],
)
def test_program_calls_the_command_that_is_named_and_run_without_a_name(calls, config, words, called):
    assert start(calls, *words, "--config", config) == 0

    assert calls.names == [called]


def test_subcommand_may_stand_behind_the_options(calls, config):
    assert start(calls, "--config", config, "verify") == 0

    assert calls.names == ["verify"]


def test_settings_of_the_command_line_reach_the_command(calls, config):
    start(calls, "--set", "seed=3", "train.steps=70", "--config", config, "--set", "seed=4")

    run = calls.made[0][1]
    assert (run.seed, run.train.steps) == (4, 70)


def test_print_config_prints_what_reads_back_to_the_same_config_and_calls_nothing(calls, config, capsys, tmp_path):
    assert start(calls, "--config", config, "--set", "seed=3", "--print-config") == 0

    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert load_run(resolved) == load_run(config, ["seed=3"])
    assert calls.names == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "nothing.yaml"], "--config must be a YAML file, got 'nothing.yaml'; see configs/ for examples"),
        (["--config", "{config}", "--bogus"], "unrecognized arguments: --bogus"),
        (["--conf", "{config}"], "the following arguments are required: --config"),
        (["destroy", "--config", "{config}"], "argument command: invalid choice: 'destroy' (choose from "),
        (["--config", "{config}", "--set", "train.stesp=1"], "did you mean 'steps'?"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_on_stderr_and_exit_code_1(calls, config, capsys, words, line):
    assert start(calls, *[word.format(config=config) for word in words]) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert line in printed.err
    assert printed.err.count("\n") == 1
    assert calls.names == []


def fail_with(error: Exception):
    def command(run: RunConfig) -> None:
        raise error

    return {"run": command}


def test_error_of_ours_becomes_one_line_even_if_its_text_has_several(config, capsys):
    error = ModelError("m must be a model,\n  got nothing; try another")

    assert run_program("", fail_with(error), arguments=["--config", config]) == 1

    assert capsys.readouterr().err == "m must be a model, got nothing; try another\n"


def test_error_keeps_the_exit_code_that_it_brings(config):
    error = ModelError("m")
    error.exit_code = 7

    assert run_program("", fail_with(error), arguments=["--config", config]) == 7


def test_bug_keeps_its_traceback(config):
    with pytest.raises(KeyError, match="a bug"):
        run_program("", fail_with(KeyError("a bug")), arguments=["--config", config])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("train", "train.micro_batch_tokens must be small enough for the GPU's memory, got 16384 and "),
        ("label", "label.slots must be small enough for the GPU's memory, got 128 and "),
        ("score", "score.batch_audio_seconds must be small enough for the GPU's memory, got 160.0 and "),
        ("quantize", "quantize.micro_batch_tokens must be small enough for the GPU's memory, got 8192 and "),
        ("export", "the GPU must hold the model, got "),
    ],
)
def test_full_gpu_names_the_setting_of_the_program(config, capsys, monkeypatch, name, line):
    monkeypatch.setattr(sys, "argv", [f"launch/{name}.py"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    assert run_program("", fail_with(error), arguments=["--config", config]) == 1

    told = capsys.readouterr().err
    assert told.startswith(f"{line}'CUDA out of memory. Tried to allocate 2.00 GiB.'; ")
    assert told.count("\n") == 1


def test_other_runtime_errors_are_bugs(config):
    with pytest.raises(RuntimeError, match="a bug"):
        run_program("", fail_with(RuntimeError("a bug")), arguments=["--config", config])


BUG_OF_A_RANK = """
import atexit, sys
from qad_dist.runtime.program import run_program
def fail(run):
    raise KeyError("a bug")
atexit.register(lambda: print("ordinary exit"))
sys.exit(run_program("", {"run": fail}))
"""


@pytest.mark.parametrize(("world_size", "told"), [("2", ""), ("1", "ordinary exit\n")])
def test_bug_of_one_of_several_ranks_keeps_its_traceback_and_ends_the_process_at_once(
    config, root, world_size, told
) -> None:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world_size, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", BUG_OF_A_RANK, "--config", config]

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert ended.returncode == 1
    assert ended.stdout == told
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert ended.stderr.endswith("KeyError: 'a bug'\n")
    assert ended.stderr.count("KeyError") == 1


def test_full_disk_names_the_file_and_the_remedy(config, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/x/y.tar")

    assert run_program("", fail_with(full), arguments=["--config", config]) == 1

    assert capsys.readouterr().err == (
        "/x/y.tar must be on a disk with free space, got a full one; "
        "free some space or set run to a folder on another disk\n"
    )


def test_forbidden_file_below_the_run_folder_is_told_and_another_one_is_a_bug(config, capsys, tmp_path):
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / "label" / "x"))
    outside = PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")

    assert run_program("", fail_with(inside), arguments=["--config", config]) == 1
    assert "/run/label/x must be writable, got 'Permission denied'; mend" in capsys.readouterr().err
    with pytest.raises(PermissionError, match="/etc/shadow"):
        run_program("", fail_with(outside), arguments=["--config", config])


@pytest.mark.parametrize(("is_shared", "told"), [(True, ""), (False, "rank=1 m must be a model\n")])
def test_other_ranks_tell_only_errors_of_their_own(config, capsys, monkeypatch, is_shared, told):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program, "OTHER_RANKS_WAIT_SECONDS", 0.0)
    error = ModelError("m must be a model")
    error.is_shared = is_shared

    assert program.tell(error) == 1

    assert capsys.readouterr().err == told


def test_launcher_variables_that_make_no_sense_are_told(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")

    assert run_program("", {"run": print}, arguments=["--config", config]) == 1

    assert capsys.readouterr().err.startswith("WORLD_SIZE must be a whole number, got 'many'; unset it")


def test_help_shows_the_docstring_and_every_option(calls, capsys):
    with pytest.raises(SystemExit, match="0"):
        start(calls, "--help")

    text = capsys.readouterr().out
    for part in ("Says what it does.", "--config", "--set", "--print-config", "--dry-run", "verify"):
        assert part in text
