"""A program that starts another one and outlives neither it nor its owner.

It reads one line of JSON: ``{"owner": <process>, "grace_seconds": <number>, "command": [...]}``. When the owner ends
the guard (SIGTERM), or is gone itself, however it died, everything that the command has started is ended, after that
grace by SIGKILL. A process that has lost its parent becomes a child of the guard, so that none escapes.

Run by its path, in a process of its own, with nothing but the standard library.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_POLL_SECONDS = 0.2
# From linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Guard the command that the input names.

    Returns:
        Its exit code; 128 and the signal's number if one ended it.
    """
    order = json.loads(sys.stdin.readline())
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: asked.append(signum))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(
        order["command"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Where the guard is killed its child is too; it has one thread, and this follows the thread that starts.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    while not _has_ended(child.pid) and not asked and os.getppid() == order["owner"]:
        time.sleep(_POLL_SECONDS)
    _end_all(child.pid, order["grace_seconds"])
    code = child.wait()
    return code if code >= 0 else 128 - code


def _end_all(group: int, grace_seconds: float) -> None:
    """End the command and all that it started: politely, then for good.

    The command has not been waited for, so that its number, by which its group is known, is nobody else's yet.
    """
    deadline = time.monotonic() + grace_seconds
    if _running():
        os.killpg(group, signal.SIGTERM)
    while (found := _running()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    while found:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
        found = _running()


def _has_ended(child: int) -> bool:
    """Whether a child has ended; it is not waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _running() -> set[int]:
    """All descendants of this process that have not ended."""
    parents: dict[int, int] = {}
    ended: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(errors="replace")
        except OSError:  # gone meanwhile
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        parents[int(path.parent.name)] = int(parent)
        if state in "ZX":
            ended.add(int(path.parent.name))
    found: set[int] = set()
    below = {os.getpid()}
    while below:
        below = {pid for pid, parent in parents.items() if parent in below}
        found |= below
    return found - ended


if __name__ == "__main__":
    sys.exit(main())
