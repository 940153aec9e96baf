"""Runs of the label stage whose files are compared byte for byte: hidden states, a second pass, verdicts and report."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.digits import DigitsRun
from tests.helpers.forking import ForkServer, Job
from tests.helpers.launching import Ended

SETTINGS = (
    "label.hidden_states=true",
    "label.second_pass=manifest",
    # Objects to about half of the labels, so that there is something to label again.
    "label.filters.confidence.min_mean_logprob=-0.11",
    "label.filters.confidence.short_slack=0",
    "read.workers=0",
)
NUM_UTTERANCES = 55


@dataclass(frozen=True, slots=True)
class LabelRun:
    """A run folder with packed shards, to be labelled by any number of jobs."""

    forks: ForkServer
    digits: DigitsRun
    folder: Path
    """Of the run."""

    @property
    def labels(self) -> Path:
        """``<run>/label``."""
        return self.folder / "label"

    def arguments(self, *settings: str) -> list[str]:
        """Of ``launch/label.py``."""
        return ["--config", str(self.digits.config), "--set", f"run={self.folder}", *SETTINGS, *settings]

    def start(self, *settings: str, ranks: int = 1, faults: Mapping[int, str] | None = None) -> Job:
        """Start to label on some ranks; ``faults`` are ``QAD_FAULT`` of some of them."""
        return self.forks.start("label", *self.arguments(*settings), ranks=ranks, faults=faults)

    def finish(self, *settings: str, ranks: int = 1) -> list[Ended]:
        """Label what is left, without faults."""
        ended = self.start(*settings, ranks=ranks).wait()
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].stderr
        return ended

    def files(self) -> dict[str, bytes]:
        """What the stage has made, but for its record: that names a command."""
        return {name: (self.labels / name).read_bytes() for name in self._names()}

    def marks(self) -> dict[str, tuple[int, int]]:
        """Inode and time of the same files: no file that was written again has those of the old one."""
        found = {name: (self.labels / name).stat() for name in self._names()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}

    def leftovers(self) -> list[str]:
        """Everything else in the folder, files of claims included."""
        files = {str(path.relative_to(self.labels)) for path in self.labels.rglob("*")}
        return sorted(files - {*self._names(), "done.json"})

    def _names(self) -> list[str]:
        return sorted(
            path.name
            for path in self.labels.glob("*")
            if path.is_file() and path.name != "done.json" and not path.name.startswith(".")
        )


def shards_labelled(log: str) -> list[str]:
    """The shards that rank 0 of a job has labelled, in its order; other ranks do not name theirs."""
    return re.findall(r"event=labelled shard=(\S+)", log)


def counts_of(log: str, name: str) -> dict[str, int]:
    """``utterances`` or ``steps`` (of both passes) of the shards that rank 0 has labelled."""
    found = re.findall(rf"event=labelled shard=(\S+) .*\b{name}=(\d+)", log)
    return {shard: int(count) for shard, count in found}


def utterances_labelled(*logs: str) -> list[int]:
    """How many each rank has labelled; of ranks that came to the end."""
    counts: dict[tuple[int, str], int] = {}
    for number, log in enumerate(logs):  # of one rank alone, or of all of a job
        for rank, count in re.findall(r"INFO (?:rank=(\d+) )?event=progress stage=label utterances=(\d+)", log):
            counts[number, rank] = int(count)
    return list(counts.values())
