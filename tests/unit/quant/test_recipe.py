"""The recipe on a small module: what is quantized, and to which values."""

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from qad_dist.linears import LINEARS
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.state import enabled_quantizers

NAMES = [name.split(".")[-1] for name in LINEARS]


class Part(nn.Module):
    """Square Linears of these names, one behind the other."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(8, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:  # not children(): ModelOpt adds some of its own
            x = getattr(self, name)(x)
        return x


class SmallModel(nn.Module):
    """Linears by the names of the real model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio_tower = Part("q_proj", "conv_out")
        self.layer = Part(*NAMES)
        self.lm_head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.layer(self.audio_tower(x)))


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def test_only_the_decoders_linears_get_quantizers(inputs: Tensor) -> None:
    model = SmallModel()

    mtq.quantize(model, modelopt_config(alpha=1.0), forward_loop=lambda m: m(inputs))

    expected = {f"layer.{name}.{kind}_quantizer" for name in NAMES for kind in ("weight", "input")}
    assert {name for name, _ in enabled_quantizers(model)} == expected


def test_weights_have_a_scale_per_output_channel_and_inputs_one_per_tensor(inputs: Tensor) -> None:
    model = SmallModel()

    mtq.quantize(model, modelopt_config(alpha=1.0), forward_loop=lambda m: m(inputs))

    linear = model.layer.q_proj
    assert linear.weight_quantizer.amax.flatten().shape == (8,)
    assert linear.input_quantizer.amax.numel() == 1
    assert linear.weight_quantizer.num_bits == linear.input_quantizer.num_bits == 8


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_linear_computes_smoothquant_as_published(inputs: Tensor, alpha: float) -> None:
    """arXiv 2211.10438, equation 4, then symmetric INT8 of 127 steps, all by hand."""
    model = Part("q_proj")
    weight, outliers = model.q_proj.weight.detach().clone(), inputs.clone()
    outliers[:, 3] *= 50

    mtq.quantize(model, modelopt_config(alpha=alpha), forward_loop=lambda m: m(outliers))

    smooth_C = outliers.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
    steps_x, steps_w = outliers / smooth_C, weight * smooth_C
    scale_x, scale_w = steps_x.abs().max() / 127, steps_w.abs().amax(1, keepdim=True) / 127
    expected = ((steps_x / scale_x).round() * scale_x) @ ((steps_w / scale_w).round() * scale_w).T
    torch.testing.assert_close(model(outliers).detach(), expected, rtol=1e-4, atol=1e-4)


def test_library_preset_is_not_changed() -> None:
    before = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)

    config = modelopt_config(alpha=0.25)

    assert before == mtq.INT8_SMOOTHQUANT_CFG
    assert config["algorithm"] == {"method": "smoothquant", "alpha": 0.25}
    assert modelopt_config(alpha=0.25) == config  # nothing piles up
