"""Attention over segments: the one function by which the audio tower and the decoder attend.

Many sequences of unequal length stand in one packed row. Each attends to itself only: the audio tower within its
8-second windows, the decoder causally within its utterance. The row is gathered into ``[S, L]`` (one line per segment,
padded to the longest), attended by torch's SDPA, and scattered back; the number of operators does not depend on the
number of segments.

Dimension key: S segments, L longest segment, T packed positions, H query heads, K key-value heads, E head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEGMENT_ATTENTION = "qad_segments"
"""Name under which transformers finds :func:`segment_attention`."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where each position of a packed row goes in the padded ``[S, L]`` layout, and back. Built once per batch."""

    gather_SL: Tensor
    """int64: packed position of each cell; padding cells point at position 0 and are masked."""
    scatter_T: Tensor
    """int64: cell (flattened) of each packed position."""
    mask_S1LL: Tensor
    """bool: which keys a query may see. Padding queries see their segment's first key, so that no row is empty."""

    @classmethod
    def from_lengths(cls, lengths_S: Tensor, *, causal: bool, device: torch.device) -> "Segments":
        """Lay out segments that follow one another in the packed row.

        Args:
            lengths_S: int64 on the host, each at least 1; their sum is T.
            causal: Whether a position sees only itself and earlier ones.
            device: Where the layout is used.
        """
        longest = int(lengths_S.max())
        starts_S = F.pad(lengths_S.cumsum(0), (1, 0))[:-1]
        within_L = torch.arange(longest)
        valid_SL = within_L < lengths_S[:, None]
        gather_SL = torch.where(valid_SL, starts_S[:, None] + within_L, 0)
        scatter_T = valid_SL.flatten().nonzero().squeeze(1)
        mask_S1LL = valid_SL[:, None, None, :]
        if causal:
            mask_S1LL = mask_S1LL & (within_L[:, None] >= within_L)
        else:
            mask_S1LL = mask_S1LL.expand(-1, 1, longest, -1)
        return cls(gather_SL.to(device), scatter_T.to(device), mask_S1LL.to(device))


def segment_attention(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1KTE: Tensor,
    value_1KTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within segments; the signature is transformers' ``AttentionInterface``.

    Args:
        module: The attention layer that asks.
        query_1HTE: One packed row. Keys and values may have fewer heads (grouped-query attention).
        attention_mask: Only used without segments: then this is transformers' own SDPA, for padded batches.
        scaling: Multiplies the scores.
        segments: The layout, from our own packed forward passes.

    Returns:
        ``[1, T, H, E]`` and no attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query_1HTE, key_1KTE, value_1KTE, attention_mask, scaling=scaling, **kwargs
        )
    padded = (_to_segments(states[0], segments) for states in (query_1HTE, key_1KTE, value_1KTE))
    query_SHLE, key_SKLE, value_SKLE = padded
    # Repeated, not `enable_gqa`: with a mask, CUDA has only its slowest kernel for that, which keeps all scores.
    queries_per_key = query_SHLE.shape[1] // key_SKLE.shape[1]
    output_SHLE = F.scaled_dot_product_attention(
        query_SHLE,
        key_SKLE.repeat_interleave(queries_per_key, dim=1),
        value_SKLE.repeat_interleave(queries_per_key, dim=1),
        attn_mask=segments.mask_S1LL,
        scale=scaling,
    )
    output_THE = output_SHLE.transpose(1, 2).flatten(0, 1).index_select(0, segments.scatter_T)
    return output_THE.unsqueeze(0), None


def _to_segments(states_HTE: Tensor, segments: Segments) -> Tensor:
    """``[H, T, E]`` to ``[S, H, L, E]``."""
    num_segments, longest = segments.gather_SL.shape
    states_HSLE = states_HTE.index_select(1, segments.gather_SL.flatten()).unflatten(1, (num_segments, longest))
    return states_HSLE.transpose(0, 1)


def register() -> None:
    """Make :func:`segment_attention` known to transformers.

    Its mask is registered too: for an attention name without one, transformers drops the padding mask silently.
    """
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
