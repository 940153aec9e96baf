"""What is quantized, and how: the settings' words as a ModelOpt configuration."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq


def modelopt_config(*, alpha: float) -> dict[str, Any]:
    """ModelOpt's INT8 SmoothQuant preset, for the decoder only.

    Weights get one scale per output channel, activations one static scale per tensor. ModelOpt's preset leaves out the
    LM head by itself, the audio tower not.

    Args:
        alpha: SmoothQuant's migration strength in [0, 1].
    """
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)  # the preset is a module global
    config["quant_cfg"].append({"quantizer_name": "*audio_tower*", "enable": False})
    config["algorithm"] = {"method": "smoothquant", "alpha": alpha}
    return config
