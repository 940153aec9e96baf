"""Fault points: places in the code where a test makes the program die, stop or fail, as machines do.

The environment variable ``QAD_FAULT`` holds ``<action>@<point>`` and conditions, ``kill@pack.before_index,shard=3``:
at ``fault_point("pack.before_index", shard=3)`` the process then kills itself. A point is met when its name is the same
and every condition equals, as text, the argument of its name. Actions:

* ``kill``: SIGKILL, as by the memory killer; nothing is cleaned up.
* ``stop``: SIGSTOP, as a rank that hangs; another process may let it go on.
* ``raise``: a :class:`FaultError`, a bug as far as the program knows.
* ``enospc``: the error of a full disk.
* ``sleep=<seconds>``: goes on after that.

Without the variable a point costs one comparison. It is read once, when this module is loaded; processes that are
started inherit it. A mistake in it is told at the first point that is passed, whichever that is.
"""

import errno
import functools
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import ConfigError

VARIABLE = "QAD_FAULT"

_ACTIONS = ("kill", "stop", "raise", "enospc", "sleep=<seconds>")


class FaultError(RuntimeError):
    """The fault that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What to do, and where."""

    action: str
    """Without what follows its ``=``."""
    seconds: float
    point: str
    conditions: tuple[tuple[str, str], ...]

    def meet(self, name: str, where: Mapping[str, object]) -> None:
        """Do it, if this is the point; as :func:`fault_point`."""
        if name != self.point or any(key not in where or str(where[key]) != value for key, value in self.conditions):
            return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "sleep":
            time.sleep(self.seconds)
        elif self.action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            raise FaultError(f"{VARIABLE} asked for a fault at {name}")


def fault_point(name: str, **where: object) -> None:
    """Do what ``QAD_FAULT`` says for this point, nothing as a rule.

    Args:
        name: ``<stage>.<place>``.
        where: What conditions may ask for.

    Raises:
        ConfigError: ``QAD_FAULT`` is not in the form above.
        FaultError: It says ``raise``.
        OSError: It says ``enospc``.
    """
    if _TEXT is not None:
        parse_fault(_TEXT).meet(name, where)


@functools.cache
def parse_fault(text: str) -> Fault:
    """Read the value of ``QAD_FAULT``. Pure.

    Raises:
        ConfigError: It is not ``<action>@<point>[,<name>=<value>]*``.
    """
    action, at, rest = text.partition("@")
    point, *parts = rest.split(",")
    conditions = [part.partition("=") for part in parts]
    kind, equals, value = action.partition("=")
    if not at or not point or any(not name or not sign for name, sign, _ in conditions):
        raise ConfigError(f"{VARIABLE} must be <action>@<point>[,<name>=<value>]*, got {text!r}; mend or unset it")
    seconds = _seconds(value) if kind == "sleep" and equals else None
    if seconds is None and (equals or kind not in ("kill", "stop", "raise", "enospc")):
        raise ConfigError(f"{VARIABLE} must name one of {', '.join(_ACTIONS)}, got {action!r}; mend or unset it")
    return Fault(
        action=kind,
        seconds=seconds or 0.0,
        point=point,
        conditions=tuple((name, value) for name, _, value in conditions),
    )


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


_TEXT = os.environ.get(VARIABLE) or None
