"""The teacher's final hidden states at the response tokens, beside a label file: what its LM head read to choose them.

A safetensors file with the one tensor ``hidden``, bfloat16 of ``[tokens, width]``, in the order of the label file; any
reader of safetensors opens it. It is written and read here by hand, as NumPy has no bfloat16: rows are the 16 bits.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import NonFiniteError, ShardError
from shards.storage import atomic_write, sha256_file

Bits = npt.NDArray[np.uint16]
"""Values in bfloat16, as their 16 bits."""

_TENSOR, _DTYPE = "hidden", "BF16"
_EXPONENT = 0x7F80  # all ones: infinite, or no number
_LENGTH_BYTES = 8  # of the header's length, in front of it
_ALIGNMENT = 8
_REMEDY = "delete its label file and label again"


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenFile:
    """What a label file says of the hidden states beside it."""

    sha256: str
    """Of the whole file."""
    width: int


def hidden_path(labels: Path) -> Path:
    """``<shard>.hidden.safetensors`` for the label file ``<shard>.jsonl``."""
    return labels.with_suffix(".hidden.safetensors")


def write_hidden(path: Path, states_TD: Bits) -> HiddenFile:
    """Write the hidden states of a shard atomically; equal states give equal bytes.

    Args:
        path: From :func:`hidden_path`.
        states_TD: Of all response tokens, ``[tokens, width]``, in the order of the label file.

    Raises:
        NonFiniteError: A state is NaN or infinite.
        StageError: The file cannot be written.
    """
    assert states_TD.dtype == np.uint16 and states_TD.ndim == 2, (states_TD.dtype, states_TD.shape)
    if ((states_TD & _EXPONENT) == _EXPONENT).any():
        raise NonFiniteError(
            f"{path}: hidden states must be finite, got NaN or infinity; the teacher overflows: check its weights, or "
            "set model.dtype to float32"
        )
    header, body = _header(*states_TD.shape), np.ascontiguousarray(states_TD, "<u2")
    with atomic_write(path) as file:
        file.write(header)
        file.write(body)
    digest = hashlib.sha256(header)
    digest.update(body)
    return HiddenFile(sha256=digest.hexdigest(), width=states_TD.shape[1])


def check_hidden(path: Path, hidden: HiddenFile, *, num_tokens: int, is_whole: bool = False) -> None:
    """Compare a file with what its label file says.

    Args:
        path: From :func:`hidden_path`.
        hidden: From the label file's header.
        num_tokens: Of all labels of that file.
        is_whole: Read it all and compare its hash as well, not only its size and header.

    Raises:
        ShardError: It is missing, or another one.
    """
    header = _header(num_tokens, hidden.width)
    num_bytes = len(header) + 2 * num_tokens * hidden.width
    try:
        if (found := path.stat().st_size) != num_bytes:
            raise ShardError(f"{path} must have {num_bytes} bytes, got {found}; {_REMEDY}")
        with path.open("rb") as file:
            if (begin := file.read(len(header))) != header:
                raise ShardError(f"{path} must begin with {header!r}, got {begin!r}; {_REMEDY}")
    except OSError as cause:
        raise ShardError(f"{path} must be readable, got {cause.strerror!r}; {_REMEDY}") from cause
    if is_whole and (digest := sha256_file(path)) != hidden.sha256:
        raise ShardError(f"{path} must have sha256 {hidden.sha256[:12]}, got {digest[:12]}; it is damaged, {_REMEDY}")


class HiddenStates:
    """The hidden states of one label file, mapped into memory: what is not asked for is not read."""

    def __init__(self, path: Path, hidden: HiddenFile, *, num_tokens: int) -> None:
        """Map the file.

        Args:
            path: From :func:`hidden_path`.
            hidden: From the label file's header.
            num_tokens: Of all labels of that file.

        Raises:
            ShardError: As :func:`check_hidden`, but for the hash.
        """
        check_hidden(path, hidden, num_tokens=num_tokens)
        shape, offset = (num_tokens, hidden.width), len(_header(num_tokens, hidden.width))
        self._rows = np.memmap(path, "<u2", "r", offset, shape)

    def rows(self, start: int, num_tokens: int) -> Bits:
        """A copy of the states of ``num_tokens`` tokens: ``[num_tokens, width]``.

        Args:
            start: Tokens before them, in the order of the label file.
            num_tokens: Of one label, as a rule.
        """
        assert 0 <= start <= start + num_tokens <= len(self._rows), (start, num_tokens, len(self._rows))
        return np.array(self._rows[start : start + num_tokens], np.uint16)


def _header(num_tokens: int, width: int) -> bytes:
    tensor = {"dtype": _DTYPE, "shape": [num_tokens, width], "data_offsets": [0, 2 * num_tokens * width]}
    text = json.dumps({_TENSOR: tensor}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
