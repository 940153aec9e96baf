"""Quantized Linears replaced by others that only decode: ModelOpt's modules serve training and calibration."""

from collections.abc import Callable, Sequence
from typing import Any

from modelopt.torch.quantization.utils import iter_shared_quant_states
from torch import nn


def replace_linears(model: nn.Module, names: Sequence[str], make: Callable[[str, Any], nn.Module]) -> None:
    """Replace Linears in place, one by one, so that what is made of one may take the place of its memory.

    Args:
        model: Contains them.
        names: Of the Linears, below ``model``.
        make: From name and Linear to what takes its place.
    """
    _release(model, {id(model.get_submodule(name)) for name in names})
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, make(name, model.get_submodule(name)))


def _release(model: nn.Module, linears: set[int]) -> None:
    """Let ModelOpt's groups of Linears with the same input, out of sight of ``modules``, not hold on to these."""
    for state in iter_shared_quant_states(model):
        state.set_members(state._parent, [member for member in state.members if id(member) not in linears])
