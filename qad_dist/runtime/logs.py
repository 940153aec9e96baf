"""Logging of the programs: one line per event, ``key=value``, no colours; events from rank 0, warnings from all.

So is the progress of :mod:`qad_dist.runtime.progress`, since each rank has its own.

A module writes ``log = logging.getLogger(__name__)`` and ``log.info("event=labelled shard=%s utterances=%d", ...)``.
"""

import io
import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout

from qad_dist.runtime.world import World

OUR_LOGGERS = ("qad_dist", "shards")
PROGRESS_LOGGER = "qad_dist.runtime.progress"

# These libraries write a screenful of INFO lines of their own, some through handlers that they set up on import.
_CHATTY_LOGGERS = ("DeepSpeed", "accelerate", "modelopt", "numexpr", "httpx", "filelock", "torch", "absl")

# Said on every start, whatever this project does.
_IDLE_WARNINGS = (
    r".*torch_dtype.*deprecated.*",
    r".*pynvml package is deprecated.*",
    r".*barrier\(\): using the device under current context.*",
    r".*`torch\.distributed\.\w+` is deprecated.*",
    r".*is not calibrated, skip smoothing.*",  # what quantize leaves out on purpose
    r".*no parallel_state is set for.*",
    r".*Detected kernel version.*",
)


def configure_logging(world: World) -> None:
    """Send our events to stderr: INFO and above from rank 0, warnings, errors and progress from every rank."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"rank={world.rank} " if world.world_size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%Y-%m-%dT%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if world.is_main else logging.WARNING)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.INFO)
    for name in _CHATTY_LOGGERS:
        # A filter, not a level: these loggers set their level again when their package is imported.
        logging.getLogger(name).addFilter(_is_warning)
    for pattern in _IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


@contextmanager
def prints_as_debug(logger: logging.Logger) -> Generator[None]:
    """Turn what a library prints inside the block into debug lines of ``logger``."""
    with redirect_stdout(io.StringIO()) as printed:
        yield
    for line in printed.getvalue().splitlines():
        logger.debug("%s", line)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
