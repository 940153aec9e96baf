"""SmoothQuant's scales, one per fold group, moved into the weights before the quantizer.

ModelOpt gives every Linear its own ``pre_quant_scale`` p, multiplied onto the input before it is quantized, and divides
the weight's columns by it. Linears that read the same input must share p for it to move into whatever made that input:

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MIN_SCALE, MAX_SCALE = 1e-4, 1e4
"""ModelOpt's own limits for a pre_quant_scale."""
SILENT_AMAX = 2.0**-31
"""A channel whose activation never exceeds this is left alone."""


@torch.no_grad()
def fold_smoothing(layers: nn.ModuleList, *, alpha: float) -> None:
    """Share the smoothing scales within each group and fold them away; the caller calibrates amax again afterwards.

    Args:
        layers: The decoder's layers, quantized by ModelOpt's ``smoothquant`` in float32.
        alpha: The alpha it was smoothed with.
    """
    layer: Any
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        num_kv_heads = attention.k_proj.out_features // attention.head_dim
        # These two first: they scale rows of up_proj and v_proj, whose final weights the other groups look at.
        _fold([mlp.down_proj], mlp.up_proj, alpha=alpha)
        _fold([attention.o_proj], attention.v_proj, alpha=alpha, num_kv_heads=num_kv_heads)
        _fold([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm, alpha=alpha)
        _fold([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm, alpha=alpha)


def _fold(consumers: Sequence[Any], producer: Any, *, alpha: float, num_kv_heads: int | None = None) -> None:
    original_weights = [linear.weight * linear.input_quantizer.pre_quant_scale for linear in consumers]
    weight_amax_C = torch.stack([weight.abs().amax(0) for weight in original_weights]).amax(0)
    activations = [linear.input_quantizer._amax_for_smoothing.flatten() for linear in consumers]
    activation_amax_C = torch.stack(activations).amax(0).to(weight_amax_C)
    if num_kv_heads is not None:
        weight_amax_C = _shared_by_query_heads(weight_amax_C, num_kv_heads, consumers[0].in_features, producer)
        activation_amax_C = _shared_by_query_heads(activation_amax_C, num_kv_heads, consumers[0].in_features, producer)
    scale_C = weight_amax_C.pow(1 - alpha) / activation_amax_C.pow(alpha)
    scale_C = torch.where(activation_amax_C <= SILENT_AMAX, 1.0, scale_C).clamp(MIN_SCALE, MAX_SCALE)
    for linear, weight in zip(consumers, original_weights, strict=True):
        linear.weight.copy_(weight / scale_C)
        quantizer = linear.input_quantizer
        del quantizer._pre_quant_scale
        quantizer._enable_pre_quant_scale = False
    if num_kv_heads is not None:  # one value per row of v_proj: the first query head's stands for its group
        scale_C = scale_C.view(num_kv_heads, -1, producer.out_features // num_kv_heads)[:, 0].flatten()
    if isinstance(producer, nn.Linear):
        producer.weight.mul_(scale_C[:, None])
        if producer.bias is not None:
            producer.bias.mul_(scale_C)
    else:
        producer.weight.mul_(scale_C)


def _shared_by_query_heads(amax_C: Tensor, num_kv_heads: int, channels: int, v_proj: Any) -> Tensor:
    head_dim = v_proj.out_features // num_kv_heads
    amax_KGE = amax_C.view(num_kv_heads, channels // v_proj.out_features, head_dim)
    return amax_KGE.amax(1, keepdim=True).expand_as(amax_KGE).reshape(-1)
