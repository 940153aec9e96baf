"""What is quantized, and how: a format as a ModelOpt configuration."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq

from qad_dist.formats import Format

E4M3 = (4, 3)
"""How ModelOpt names the bits of exponent and mantissa."""
PER_TOKEN = (-3, -2)
"""The axes of ``[batch, tokens, channels]`` that keep scales of their own. ModelOpt's ``block_sizes: {-1: None}`` means
the same, but settles at its first input: with another number of axes it is then per tensor, without a word."""


def modelopt_config(recipe: Format, *, group_size: int) -> dict[str, Any]:
    """Quantizers for the Linears of the decoder, without an algorithm: this project calibrates.

    ModelOpt's preset leaves out the LM head by itself, the audio tower not.

    Args:
        recipe: The format.
        group_size: Weights that share a scale, in formats that have groups.
    """
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)  # the preset is a module global
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"] = _weights(recipe, group_size)
        if entry["quantizer_name"] == "*input_quantizer":
            if recipe.input_scales == "none":
                entry.pop("cfg")
                entry["enable"] = False
            else:
                entry["cfg"] = _inputs(recipe)
    config["quant_cfg"].append({"quantizer_name": "*audio_tower*", "enable": False})
    config["algorithm"] = None
    return config


def _weights(recipe: Format, group_size: int) -> dict[str, Any]:
    num_bits = E4M3 if recipe.is_float else recipe.weight_bits
    if recipe.weight_scales == "group":
        return {"num_bits": num_bits, "block_sizes": {-1: group_size, "type": "static"}}
    return {"num_bits": num_bits, "axis": 0 if recipe.weight_scales == "channel" else None}


def _inputs(recipe: Format) -> dict[str, Any]:
    num_bits = E4M3 if recipe.is_float else 8
    if recipe.input_scales == "token":
        return {"num_bits": num_bits, "type": "dynamic", "axis": PER_TOKEN}
    return {"num_bits": num_bits, "axis": None}
