"""Bad input on the real command lines: one line on stderr, exit code 1, quickly, and nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = ("pack", "label", "quantize", "train", "score", "export", "check", "run")

HEAVY = ("torch", "transformers", "modelopt", "deepspeed", "accelerate", "qwen_asr", "pyarrow")


def start(root: Path, cwd: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "launch" / f"{program}.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=250)


@pytest.mark.parametrize("program", PROGRAMS)
def test_unknown_setting_is_one_line_and_exit_code_1(root, tmp_path, program):
    (tmp_path / "run.yaml").write_text("run: r\nmodel: {path: m}\npack: {inputs: [a]}\ntrain: {stpes: 3}\n")

    ended = start(root, tmp_path, program, "--config", "run.yaml")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "train.stpes must be a setting of this project, got an unknown name; did you mean 'steps'?\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "no.yaml"], "--config must be a YAML file, got 'no.yaml'; see configs/ for examples\n"),
        ([], "label.py: the following arguments are required: --config; see label.py --help\n"),
        (
            ["--config", "run.yaml", "--set", "train.steps=0"],
            "train.steps must be greater than or equal to 1, got 0; see configs/README.md\n",
        ),
    ],
)
def test_mistake_in_file_or_options_is_one_line_and_exit_code_1(root, tmp_path, arguments, line):
    (tmp_path / "run.yaml").write_text("run: r\nmodel: {path: m}\npack: {inputs: [a]}\n")

    ended = start(root, tmp_path, "label", *arguments)

    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_config_is_told(root, tmp_path):
    (tmp_path / "run.yaml").write_text("run: r\n")
    (tmp_path / "run.yaml").chmod(0)

    ended = start(root, tmp_path, "label", "--config", "run.yaml")

    assert ended.returncode == 1
    assert ended.stderr == "run.yaml must be readable, got 'Permission denied'; mend its permissions\n"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("arguments", [["--help"], ["--config", "no.yaml"]], ids=["help", "mistake"])
def test_help_and_mistakes_are_answered_without_heavy_imports(root, tmp_path, program, arguments):
    script = (
        "import runpy, sys\n"
        f"sys.argv = [{program + '.py'!r}, *{arguments!r}]\n"
        f"try:\n    runpy.run_path({str(root / 'launch' / (program + '.py'))!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.stdout.write(f'heavy={heavy}')\n"
    )

    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)

    assert ended.stdout.endswith("heavy=[]")


def test_ranks_of_a_launch_tell_a_missing_stage_once(root, tmp_path):
    config = ["--config", "configs/toy.yaml", "--set", f"run={tmp_path}/run"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "launch/label.py", *config]

    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600)

    told = f"{tmp_path}/run/pack must be finished before this stage, got no done.json; run `python launch/pack.py"
    assert ended.returncode == 1
    assert ended.stderr.count(told) == 1, ended.stderr
