"""The command line that all programs share: ``launch/X.py [subcommand] --config F [--set a.b=c] [--print-config]``.

Errors that a user can mend become one line on stderr and exit code 1; a bug keeps its traceback. Nothing heavy is
imported here, so ``--help`` and a mistake in the config are answered at once; a stage is imported when its command is
called.
"""

import argparse
import errno
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from qad_dist.config import RunConfig, dump_run, load_run
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import current_world, exit_rank, program_name
from shards.errors import ConfigError, QadError, StageError
from shards.places import without_queries

Command = Callable[..., None]
"""Takes the config, and the options of a program that has some of its own."""

DEFAULT_COMMAND = "run"

OTHER_RANKS_WAIT_SECONDS = 2.0

# By program: the setting that decides how much is on the GPU at once.
SETTING_OF_MEMORY = {
    "label": "label.slots",
    "quantize": "quantize.micro_batch_tokens",
    "train": "train.micro_batch_tokens",
    "score": "score.batch_audio_seconds",
}


def run_program(
    doc: str | None,
    commands: Mapping[str, Command],
    *,
    dry_run: Command | None = None,
    add_options: Callable[[argparse.ArgumentParser], object] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, load the config, call one command.

    Args:
        doc: The program's docstring, shown by ``--help``.
        commands: Subcommand name to what it calls; ``run`` is the one that needs no name.
        dry_run: What ``--dry-run`` calls instead; without it the program has no such option.
        add_options: Adds the options that only this program has; its commands then get all of them as ``options``.
        arguments: Instead of the process's own.

    Returns:
        The exit code: 0, or that of the error (1) after one line on stderr. One of several ranks does not return: it
        ends here, after the traceback of a bug too.
    """
    try:
        world = current_world()
        parser = _parser(doc, commands, has_dry_run=dry_run is not None)
        if add_options is not None:
            add_options(parser)
        parsed = parser.parse_intermixed_args(arguments)
        run = load_run(parsed.config, parsed.overrides)
    except QadError as error:
        return tell(error)
    if parsed.print_config:
        sys.stdout.write(dump_run(run))
        return 0
    command = dry_run if dry_run is not None and parsed.dry_run else commands[parsed.command]
    if add_options is not None:
        command = partial(command, options=parsed)
    try:
        code = call_command(command, run)
    except Exception:
        if world.world_size == 1:
            raise
        traceback.print_exc()  # as the interpreter would, which may abort afterwards: see exit_rank
        code = 1
    if world.world_size > 1:
        exit_rank(code)
    return code


def call_command(command: Command, run: RunConfig) -> int:
    """Call ``command`` with logging set up.

    Returns:
        0, or the error's exit code (1) after one line on stderr: for our own errors, for a full disk or a forbidden
        run folder, and for a GPU without memory left.
    """
    configure_logging(current_world())
    try:
        command(run)
    except QadError as error:
        return tell(error)
    except OSError as error:
        if (mendable := _mendable(error, run)) is None:
            raise
        return tell(mendable)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return tell(_too_much_at_once(error, run))
    return 0


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--config`` and ``--set``, the same for every program."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML, e.g. configs/toy.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="change settings for this start, e.g. --set train.steps=100 seed=1",
    )


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are our kind of error: one line, with the remedy."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser(doc: str | None, commands: Mapping[str, Command], *, has_dry_run: bool) -> argparse.ArgumentParser:
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    named = [name for name in commands if name != DEFAULT_COMMAND]
    if DEFAULT_COMMAND in commands:
        parser.set_defaults(command=DEFAULT_COMMAND)
    if named:
        nargs = "?" if DEFAULT_COMMAND in commands else None
        parser.add_argument("command", nargs=nargs, choices=list(commands), default=DEFAULT_COMMAND)
    add_config_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print every setting as resolved, and stop")
    if has_dry_run:
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    return parser


def _mendable(error: OSError, run: RunConfig) -> StageError | None:
    """What a full disk or a forbidden run folder comes to; None for any other failure, which is a bug of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or set run to a folder on another disk"
        return StageError(f"{error.filename or run.run} must be on a disk with free space, got a full one; {remedy}")
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not isinstance(error.filename, str):
        return None
    if not Path(error.filename).absolute().is_relative_to(run.folder.absolute()):
        return None
    remedy = "mend its permissions or set run to another folder"
    return StageError(f"{error.filename} must be writable, got {error.strerror!r}; {remedy}")


def _is_out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # a program that has not imported it did not fill a GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _too_much_at_once(error: RuntimeError, run: RunConfig) -> StageError:
    reason = str(error).splitlines()[0]
    if (name := SETTING_OF_MEMORY.get(program_name())) is None:
        return StageError(f"the GPU must hold the model, got {reason!r}; use one with more free memory")
    section, setting = name.split(".")
    found = getattr(getattr(run, section), setting)
    return StageError(f"{name} must be small enough for the GPU's memory, got {found} and {reason!r}; lower it")


def tell(error: QadError) -> int:
    """Print the error as one line, once where all ranks have it, and give the program's exit code."""
    rank = _rank()
    if rank > 0:
        # Where rank 0 fails too, its line is enough: the launcher ends this process while it waits.
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    if rank == 0 or not error.is_shared:
        line = without_queries(" ".join(str(error).split()))
        print(line if rank == 0 else f"rank={rank} {line}", file=sys.stderr, flush=True)  # noqa: T201
    return error.exit_code


def _rank() -> int:
    try:
        return current_world().rank
    except QadError:  # the launcher's variables are what is wrong
        return 0
