import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qad_dist.runtime import machine
from qad_dist.runtime.machine import (
    FAIL,
    OK,
    WARN,
    Finding,
    check_disk,
    check_folder,
    check_imports,
    check_packages,
    check_processors,
    guarded,
)
from shards.errors import ModelError


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_check_packages_passes_where_the_project_was_installed() -> None:
    assert levels(list(check_packages())) == [OK]


def test_check_packages_names_each_version_that_is_not_the_pinned_one() -> None:
    findings = list(check_packages(["pytest==1.0", "no-such-package-here>=2", "pydantic>=2"]))

    assert levels(findings) == [FAIL, FAIL]
    assert "pytest must be ==1.0, got " in findings[0].text
    assert "no-such-package-here must be >=2, got nothing; pip install 'no-such-package-here>=2'" in findings[1].text


def test_check_packages_ignores_the_name_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.metadata, "version", lambda name: "2.13.0+cpu")

    assert levels(list(check_packages(["torch==2.13.0"]))) == [OK]


def test_check_packages_leaves_out_requirements_of_other_systems() -> None:
    assert levels(list(check_packages(["no-such-package-here; sys_platform == 'amiga'"]))) == [OK]


def test_check_imports_names_the_package_that_does_not_load() -> None:
    findings = list(check_imports(("json", "no_such_module_here", "tarfile")))

    assert levels(findings) == [FAIL]
    assert findings[0].text.startswith("no_such_module_here must load, got ModuleNotFoundError")


def test_check_imports_survives_a_package_that_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies_on_import.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    (finding,) = check_imports(("dies_on_import",))

    assert finding.level == FAIL
    assert "got exit code 7" in finding.text


def test_check_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (finding,) = check_folder(tmp_path / "not" / "yet")

    assert finding.level == OK
    assert list(tmp_path.iterdir()) == []


def test_check_folder_names_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)

    (finding,) = check_folder(tmp_path)

    assert finding.level == FAIL
    assert f"got {tmp_path} (Read-only file system)" in finding.text


@pytest.mark.parametrize(("need_bytes", "level"), [(3_000_000, OK), (3_000_001, FAIL)])
def test_check_disk_fails_when_less_is_free_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_bytes: int, level: str
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3_000_000))

    (finding,) = check_disk(tmp_path / "run", need_bytes=need_bytes, what="2 checkpoints")

    assert finding.level == level
    assert "needed for 2 checkpoints" in finding.text


def test_check_processors_warns_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    (finding,) = check_processors(dtype="bfloat16")

    assert finding.level == WARN


def test_guarded_turns_an_error_of_ours_into_the_last_finding_and_lets_bugs_fly() -> None:
    first = Finding(OK, "model", "is there")

    def ends(error: Exception) -> Any:
        yield first
        raise error

    assert list(guarded("model", ends(ModelError("no weights")))) == [first, Finding(FAIL, "model", "no weights")]
    with pytest.raises(TypeError, match="a bug"):
        list(guarded("model", ends(TypeError("a bug"))))
