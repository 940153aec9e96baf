"""What shares a scale in a ModelOpt quantizer: its axes and block sizes say it in several ways."""

from typing import Any


def is_one_scale(quantizer: Any) -> bool:
    """Whether a static quantizer has one scale for everything."""
    return not quantizer._dynamic and quantizer.block_sizes is None and quantizer.axis is None


def is_per_token(quantizer: Any) -> bool:
    """Whether only values along the last dimension share a scale.

    Axes are those that do not share. ModelOpt makes them of block sizes when it sees the first input, counted from the
    front, and then reads an input of other dimensions otherwise; counted from the back they fit 2 and 3 dimensions.
    """
    if quantizer.block_sizes is not None:
        return {key: size for key, size in quantizer.block_sizes.items() if isinstance(key, int)} == {-1: None}
    axis = quantizer.axis
    return isinstance(axis, tuple) and axis in (tuple(range(len(axis))), tuple(range(-1 - len(axis), -1)))
