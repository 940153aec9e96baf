"""Scales of quantizers: what shares one, which ModelOpt says in several ways, and that none is ever cast."""

from typing import Any, ClassVar, Self

from torch import nn


class ScaledModule(nn.Module):
    """A module with scales in float32 that stay so when it is cast: rounded, they would belong to other codes."""

    scale_names: ClassVar[tuple[str, ...]]
    """Of the buffers that are scales; some may be None."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As ``to`` and ``bfloat16`` call it."""
        scales = {name: getattr(self, name) for name in self.scale_names}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(getattr(self, name).device))
        return self


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
