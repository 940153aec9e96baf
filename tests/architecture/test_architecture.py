"""The shape of the project: who may import whom, what lies where, what every file must have."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from qad_dist.config import dump_run, load_run
from qad_dist.config.page import settings_readme
from qad_dist.config.section import SourceKind
from qad_dist.runtime.record import STAGES
from shards.sources import KINDS
from tests.conftest import LIMITS, ROOT

TOP_LEVEL = {"pyproject.toml", "launch", "qad_dist", "shards", "configs", "tests", "README.md"}

MODULES = sorted(
    path
    for folder in ("launch", "qad_dist", "shards", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name]


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_imports_keep_the_contracts():
    # Not through the console script: it may not be on the path.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    linted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert "0 broken" in linted.stdout


def test_import_contracts_are_broken_by_an_import_against_the_direction(tmp_path):
    for package in ("qad_dist", "shards"):
        subprocess.run(["cp", "-r", str(ROOT / package), str(tmp_path)], check=True)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with (tmp_path / "shards" / "errors.py").open("a") as file:
        file.write("import qad_dist.config\nimport modelopt\n")

    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    linted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert linted.returncode == 1
    assert "One direction only BROKEN" in linted.stdout
    assert "Only qad_dist.quant touches modelopt BROKEN" in linted.stdout


def test_nothing_else_lies_at_the_top():
    found = {path.parts[0] for path in tracked_files()}

    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_every_module_says_what_is_in_it():
    modules = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "tests"]
    silent = [path for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]

    assert len(modules) > 40
    assert relative(silent) == []


def test_programs_are_thin():
    long = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "launch").glob("*.py")}

    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def test_there_is_one_program_and_one_module_for_each_stage():
    for stage in STAGES:
        assert (ROOT / "launch" / f"{stage}.py").is_file(), stage
        assert (ROOT / "qad_dist" / "stages" / f"{stage}.py").is_file(), stage


def test_nobody_imports_the_programs():
    importers = [
        path
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "launch")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "launch" for alias in node.names))
    ]

    assert relative(importers) == []


def test_environment_is_read_only_where_programs_find_themselves():
    # The config expands ${QAD_...}; the engine tells accelerate and DeepSpeed what no launcher has told them; a fault
    # that is asked for by a variable reaches every process.
    allowed = {
        "qad_dist/runtime/world.py",
        "qad_dist/runtime/engine/launched.py",
        "qad_dist/config/values.py",
        "shards/faults.py",
    }
    readers = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.relative_to(ROOT).parts[0] in ("qad_dist", "shards")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("os", "environ"), ("os", "getenv"), ("sys", "argv")}
    ]

    assert sorted(set(readers) - allowed) == []


def test_table_of_settings_is_the_generated_one():
    assert (ROOT / "configs/README.md").read_text(encoding="utf-8") == settings_readme(), (
        "run: python -m qad_dist.config.page > configs/README.md"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_run_config_loads_and_reads_back(path: Path, monkeypatch, tmp_path):
    monkeypatch.setenv("QAD_SPEECH_DIR", "/speech")

    run = load_run(path)

    assert run.run == f"runs/{path.stem}"
    assert (ROOT / run.train.deepspeed).is_file()
    (tmp_path / "again.yaml").write_text(dump_run(run), encoding="utf-8")
    assert load_run(tmp_path / "again.yaml") == run


def test_every_kind_of_test_has_a_time_limit():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}

    assert folders - {"assets", "helpers"} <= set(LIMITS)


def test_embedded_assets_stay_small():
    sizes = {
        name: sum(file.stat().st_size for file in (ROOT / "tests/assets" / name).rglob("*") if file.is_file())
        for name in ("digits", "nano-teacher")
    }

    assert all(size <= 4_000_000 for size in sizes.values()), sizes


def test_kinds_of_sources_are_the_modules_that_read_them():
    assert set(get_args(SourceKind)) == set(KINDS)
