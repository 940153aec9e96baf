"""Smoothing scales, one per fold group, moved into the weights before the quantizers.

SmoothQuant divides the input of a Linear by a scale for each channel before it is quantized, and multiplies the
weight's columns by it. Linears that read the same input must share it, for the division to move into whatever made that
input:

========================  ======================================================
group                     folds into
========================  ======================================================
q, k, v                   weight of ``input_layernorm``
gate, up                  weight of ``post_attention_layernorm``
down                      rows of ``up_proj`` (SwiGLU is linear in it)
o                         rows of ``v_proj``; each KV head feeds several query
                          heads, so these share the scales of its channels
========================  ======================================================

After folding no runtime multiply remains and the function of the layer in float arithmetic is unchanged.

Dimension key: C input channels, K key-value heads, G query heads of each, E head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldGroup:
    """Linears of one decoder layer that read the same input."""

    name: str
    """``qkv``, ``o``, ``gate_up`` or ``down``."""
    consumers: dict[str, Any]
    """The Linears, by their names below the layer."""
    producer: Any
    """The norm, or the Linear, that makes their input."""
    num_kv_heads: int | None = None
    """Of ``o``: key-value heads, whose query heads share scales."""

    @property
    def num_channels(self) -> int:
        """C."""
        return next(iter(self.consumers.values())).in_features

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(iter(self.consumers.values())).weight.device

    def share(self, maxima_C: Tensor) -> Tensor:
        """The largest of the channels that must have one scale, for each of them; else what came in."""
        if self.num_kv_heads is None:
            return maxima_C
        maxima_KGE = maxima_C.view(self.num_kv_heads, -1, self.producer.out_features // self.num_kv_heads)
        return maxima_KGE.amax(1, keepdim=True).expand_as(maxima_KGE).reshape(-1)

    @torch.no_grad()
    def fold(self, scale_C: Tensor) -> None:
        """Divide the group's input by ``scale_C`` in what makes it, and multiply the columns that read it.

        Args:
            scale_C: Positive; equal where :meth:`share` makes it so. Float arithmetic stays the same up to rounding, or
                exactly for powers of two.
        """
        for linear in self.consumers.values():
            linear.weight.mul_(scale_C)
        if self.num_kv_heads is not None:  # one value per row of v_proj: the first query head's stands for its group
            head_dim = self.producer.out_features // self.num_kv_heads
            scale_C = scale_C.view(self.num_kv_heads, -1, head_dim)[:, 0].flatten()
        if isinstance(self.producer, nn.Linear):
            self.producer.weight.div_(scale_C[:, None])
            if self.producer.bias is not None:
                self.producer.bias.div_(scale_C)
        else:
            self.producer.weight.div_(scale_C)


def fold_groups(layer: Any) -> list[FoldGroup]:
    """The four groups of a decoder layer, in the order in which the layer computes them."""
    attention, mlp = layer.self_attn, layer.mlp
    num_kv_heads = attention.k_proj.out_features // attention.head_dim
    readers = {f"self_attn.{name}_proj": getattr(attention, f"{name}_proj") for name in ("q", "k", "v")}
    return [
        FoldGroup(name="qkv", consumers=readers, producer=layer.input_layernorm),
        FoldGroup(
            name="o",
            consumers={"self_attn.o_proj": attention.o_proj},
            producer=attention.v_proj,
            num_kv_heads=num_kv_heads,
        ),
        FoldGroup(
            name="gate_up",
            consumers={"mlp.gate_proj": mlp.gate_proj, "mlp.up_proj": mlp.up_proj},
            producer=layer.post_attention_layernorm,
        ),
        FoldGroup(name="down", consumers={"mlp.down_proj": mlp.down_proj}, producer=mlp.up_proj),
    ]
