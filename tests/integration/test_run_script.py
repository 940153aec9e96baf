"""``launch/run.sh``: a config may be named from the folder where the command is typed."""

import subprocess
from pathlib import Path

import pytest

SETUP = """
set_up() { cd "$(dirname "${BASH_SOURCE[0]}")/.."; PATH="$PWD/tools:$PATH"; }
"""
PYTHON = """#!/bin/bash
printf '%s\\n' "$PWD" "$@"
"""


@pytest.fixture
def script(root: Path, tmp_path: Path) -> Path:
    """The script in a project whose set-up and python are stood in for."""
    launch, tools = tmp_path / "project" / "launch", tmp_path / "project" / "tools"
    launch.mkdir(parents=True)
    tools.mkdir()
    (launch / "run.sh").write_text((root / "launch" / "run.sh").read_text())
    (launch / "setup.sh").write_text(SETUP)
    (tools / "python").write_text(PYTHON)
    (tools / "python").chmod(0o755)
    return launch / "run.sh"


@pytest.mark.parametrize("name", ["a b.yaml", "below/c.yaml"])
@pytest.mark.parametrize("is_one_word", [True, False])
def test_config_is_found_from_where_the_command_is_typed(script, tmp_path, name, is_one_word) -> None:
    def option(value: str | Path) -> list[str]:
        return [f"--config={value}"] if is_one_word else ["--config", str(value)]

    caller = tmp_path / "elsewhere"
    (caller / name).parent.mkdir(parents=True)
    (caller / name).touch()
    words = ["bash", str(script), *option(name), "--set", "a=b"]

    output = subprocess.check_output(words, cwd=caller, text=True, timeout=300)

    project = str(tmp_path / "project")
    assert output.splitlines() == [project, "launch/run.py", *option(caller / name), "--set", "a=b"]


def test_config_that_is_not_there_is_left_to_the_program(script: Path, tmp_path: Path) -> None:
    words = ["--config=configs/toy.yaml", "--config", "configs/toy.yaml"]

    output = subprocess.check_output(["bash", script, *words], cwd=tmp_path, text=True, timeout=300)

    assert output.splitlines()[2:] == words
