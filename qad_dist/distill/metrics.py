"""``metrics.jsonl`` and its like: lines of a run by step, never told twice, however often training was resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.storage import atomic_write


class MetricsFile:
    """Appends lines; one rank only."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open the file, forgetting the lines after the step that training resumes from."""
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resumed_step]
        with atomic_write(path) as file:
            file.write("".join(kept if resumed_step else []).encode())

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append ``{"step": step, **values}``; JSON-able values, whose numbers must be finite: JSON has no others."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
