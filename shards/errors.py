"""Every error that a user can mend, in one tree.

Form of a message: ``<setting or file> <rule>, got <value>; <remedy>``. Programs turn a :class:`QadError` into one line
on stderr and exit code 1; any other exception is a bug of ours and keeps its traceback.
"""


class QadError(Exception):
    """Base of all errors that name a setting or file, the value found, the rule and the remedy."""

    is_shared = False
    """Whether every rank raises this same error, so that rank 0 alone tells it."""

    exit_code = 1
    """Of the program that ends by it."""


class ConfigError(QadError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class SourceError(QadError, ValueError):
    """A manifest or folder of recordings cannot be read as what it claims to be."""


class AudioError(QadError, ValueError):
    """One recording cannot be decoded into speech: the utterance is rejected, the run goes on."""


class ShardError(QadError, ValueError):
    """A shard, index or label file is missing, damaged, or not the one that was read before."""


class StageError(QadError, RuntimeError):
    """A stage lacks the output of an earlier one, or may not write where it should."""


class ModelError(QadError, ValueError):
    """A model folder is missing, of the wrong kind, or disagrees with what this project assumes of it."""


class WorldError(QadError, RuntimeError):
    """The number of ranks, or the engine behind them, is not what the run needs."""


class CheckpointError(QadError, RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class NonFiniteError(QadError, ArithmeticError):
    """A loss or gradient stopped being a number."""
