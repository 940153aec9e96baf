"""``metrics.jsonl``: one line for each look at the run, never two for one step, however often it was resumed."""

import json
from pathlib import Path

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

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append ``{"step": step, **values}``; values must be finite, JSON has no others."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
