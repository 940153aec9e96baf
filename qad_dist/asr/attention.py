"""Attention over segments: the one function by which the audio tower and the decoder attend.

Many sequences of unequal length stand in one packed row. Each attends to itself only: the audio tower within its
8-second windows, the decoder causally within its utterance. Segments of similar length form a group: it is gathered
into ``[G, L]`` (one line per segment, padded to its longest), attended by torch's SDPA, and scattered back. The number
of operators does not depend on the number of segments, and most segments are padded to less than twice their length.

Dimension key: S segments, G segments of a group, L longest of a group, T packed positions, H query heads, K key-value
heads, E head width.
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


NUM_GROUPS = 3
"""The longest down to half their length, those down to a quarter of it, and the rest."""


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments that are padded to the same length."""

    gather_GL: Tensor
    """int64: packed position of each cell; padding cells point at position 0 and are masked."""
    mask_G1LL: Tensor
    """bool: which keys a query may see. Padding queries see their segment's first key, so that no row is empty."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where each position of a packed row goes in the padded layouts, and back. Built once per batch."""

    groups: tuple[SegmentGroup, ...]
    scatter_T: Tensor
    """int64: cell of each packed position, the flattened groups standing one behind the other."""

    @classmethod
    def from_lengths(cls, lengths_S: Tensor, *, causal: bool, device: torch.device) -> "Segments":
        """Lay out segments that follow one another in the packed row.

        Args:
            lengths_S: int64 on the host, each at least 1; their sum is T.
            causal: Whether a position sees only itself and earlier ones.
            device: Where the layout is used.

        Returns:
            Always :data:`NUM_GROUPS` groups of at least two segments and positions, empty ones where there are not so
            many: compilers take a size of 0 or 1 for a constant, and would make another graph for it.
        """
        num_positions = int(lengths_S.sum())
        starts_S = F.pad(lengths_S.cumsum(0), (1, 0))[:-1]
        group_S = torch.tensor(_groups_of(lengths_S.tolist()))
        groups: list[SegmentGroup] = []
        scatter_T, num_cells = torch.empty(num_positions, dtype=torch.int64), 0
        for number in range(NUM_GROUPS):
            is_in_S = group_S == number
            lengths_G, starts_G = lengths_S[is_in_S], starts_S[is_in_S]
            missing = max(0, 2 - len(lengths_G))
            lengths_G, starts_G = F.pad(lengths_G, (0, missing)), F.pad(starts_G, (0, missing))
            within_L = torch.arange(max(2, int(lengths_G.max())))
            valid_GL = within_L < lengths_G[:, None]
            positions_GL = torch.where(valid_GL, starts_G[:, None] + within_L, 0)
            cells = valid_GL.flatten().nonzero().squeeze(1)
            scatter_T[positions_GL.flatten()[cells]] = num_cells + cells
            num_cells += valid_GL.numel()
            mask_G1LL = _mask(lengths_G, within_L, causal=causal)
            groups.append(SegmentGroup(positions_GL.to(device), mask_G1LL.to(device)))
        return cls(tuple(groups), scatter_T.to(device))


def _groups_of(lengths: list[int]) -> list[int]:
    """0 for lengths above half the longest, 1 above a quarter, and so on; the next longest joins one that is alone."""
    longest = max(lengths)
    groups = [sum(2**power * length <= longest for power in range(1, NUM_GROUPS)) for length in lengths]
    for number in range(NUM_GROUPS - 1):
        shorter = [place for place, group in enumerate(groups) if group > number]
        if groups.count(number) == 1 and shorter:
            groups[max(shorter, key=lambda place: lengths[place])] = number
    return groups


def _mask(lengths_G: Tensor, within_L: Tensor, *, causal: bool) -> Tensor:
    # Of an empty segment one key is seen: a softmax over nothing would bring NaN to the gradients.
    seen_G11L = (within_L < lengths_G.clamp(min=1)[:, None])[:, None, None, :]
    if causal:
        return seen_G11L & (within_L[:, None] >= within_L)
    return seen_G11L.expand(-1, 1, len(within_L), -1)


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
    # Repeated, not `enable_gqa`: with a mask, CUDA has only its slowest kernel for that, which keeps all scores.
    queries_per_key = query_1HTE.shape[1] // key_1KTE.shape[1]
    key_1HTE, value_1HTE = (states.repeat_interleave(queries_per_key, dim=1) for states in (key_1KTE, value_1KTE))
    parts = []
    for group in segments.groups:
        query_GHLE, key_GHLE, value_GHLE = (
            _to_group(states[0], group.gather_GL) for states in (query_1HTE, key_1HTE, value_1HTE)
        )
        output_GHLE = F.scaled_dot_product_attention(
            query_GHLE, key_GHLE, value_GHLE, attn_mask=group.mask_G1LL, scale=scaling
        )
        parts.append(output_GHLE.transpose(1, 2).flatten(0, 1))
    output_THE = torch.cat(parts).index_select(0, segments.scatter_T)
    return output_THE.unsqueeze(0), None


def _to_group(states_HTE: Tensor, gather_GL: Tensor) -> Tensor:
    """``[H, T, E]`` to ``[G, H, L, E]``."""
    num_segments, longest = gather_GL.shape
    states_HGLE = states_HTE.index_select(1, gather_GL.flatten()).unflatten(1, (num_segments, longest))
    return states_HGLE.transpose(0, 1)


def register() -> None:
    """Make :func:`segment_attention` known to transformers.

    Its mask is registered too: for an attention name without one, transformers drops the padding mask silently.
    """
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
