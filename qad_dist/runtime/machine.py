"""What this machine offers a run: packages, processors, disk. Each answer is a finding: ok, warn or fail, and why."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from shards.errors import QadError

OK, WARN, FAIL = "ok", "warn", "fail"

PROJECT = "qad-dist"
IMPORTS = ("torch", "transformers", "accelerate", "deepspeed", "modelopt.torch.quantization", "qwen_asr", "webdataset")
"""Imported to see whether they load here: a package may be installed and still miss a library of the system."""
IMPORT_LIMIT_SECONDS = 300

# Each name by itself, so that the first failure does not hide the others.
_IMPORT_SCRIPT = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
print("\\n" + json.dumps(failed))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A run can go on after ``ok`` and ``warn``."""

    level: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.subject}: {self.text}"


def guarded(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Pass findings on; an error of ours that ends them early becomes the last one."""
    try:
        yield from findings
    except QadError as error:
        yield Finding(FAIL, subject, str(error))


def check_packages(requirements: list[str] | None = None) -> Iterator[Finding]:
    """Compare installed versions with what the project pins.

    Args:
        requirements: Instead of the project's own, in the notation of pyproject.toml.
    """
    wanted = [Requirement(text) for text in (_project_requirements() if requirements is None else requirements)]
    wrong = 0
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "nothing"
        # A local part such as +cpu names the build, not another release.
        if version == "nothing" or not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong += 1
            rule = f"must be {requirement.specifier or 'installed'}, got {version}"
            yield Finding(FAIL, "packages", f"{requirement.name} {rule}; pip install '{requirement}'")
    if not wrong:
        yield Finding(OK, "packages", f"Python {sys.version.split()[0]} and {len(wanted)} requirements as pinned")


def check_imports(names: tuple[str, ...] = IMPORTS) -> Iterator[Finding]:
    """Import the heavy packages in a fresh process."""
    command = [sys.executable, "-c", _IMPORT_SCRIPT, *names]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        text = f"{', '.join(names)} must load within {IMPORT_LIMIT_SECONDS} s, got no answer; is the disk reachable?"
        yield Finding(FAIL, "imports", text)
        return
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        end = (process.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(FAIL, "imports", f"{', '.join(names)} must load, got exit code {process.returncode}: {end}")
        return
    failed = json.loads(lines[-1])
    for name, reason in failed.items():
        yield Finding(FAIL, "imports", f"{name} must load, got {reason}; install it again")
    if not failed:
        yield Finding(OK, "imports", f"{', '.join(names)} load")


def check_processors(*, dtype: str) -> Iterator[Finding]:
    """Name the GPUs, or say that there are none."""
    import torch

    if not torch.cuda.is_available():
        text = f"no GPU is visible; every rank computes on the CPU ({os.cpu_count()} cores), which is for small models"
        yield Finding(WARN, "processors", text)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        text = f"GPU {number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding(OK, "processors", text)
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        text = "model.dtype must be one that the GPU computes in, got bfloat16; set model.dtype to float32"
        yield Finding(FAIL, "processors", text)


def check_folder(folder: Path) -> Iterator[Finding]:
    """Write, sync and remove a file where the run's folder is or will be; nothing stays behind."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\n" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = (
            f"run must be a folder that can be written to, got {folder} ({error.strerror}); set run to another folder"
        )
        yield Finding(FAIL, "run folder", text)
    else:
        yield Finding(OK, "run folder", f"{folder} can be written to")


def check_disk(folder: Path, *, need_bytes: int, what: str) -> Iterator[Finding]:
    """Compare the free space of the run's disk with what the run will write.

    Args:
        folder: The run's folder, which need not exist.
        need_bytes: Estimate.
        what: What the estimate covers.
    """
    free = shutil.disk_usage(_existing(folder)).free
    text = f"{free / 1e9:,.1f} GB free, {need_bytes / 1e9:,.2f} GB needed for {what}"
    if free < need_bytes:
        yield Finding(FAIL, "disk", f"run must be on a disk with enough space, got {text}; free some or move run")
    else:
        yield Finding(OK, "disk", text)


def _project_requirements() -> list[str]:
    """The project's requirements without extras: of the installed package, else of the source tree's pyproject.toml."""
    try:
        listed = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        source = Path(__file__).parents[2] / "pyproject.toml"
        listed = tomllib.loads(source.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [text for text in listed if not re.search(r";.*\bextra\s*==", text)]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
