"""The formats on a small module: what is quantized, and to which values."""

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from qad_dist.formats import FORMATS, FormatName
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


def quantized(name: FormatName, inputs: Tensor) -> SmallModel:
    """Calibrated by ModelOpt, in groups of 4."""
    model = SmallModel()
    mtq.quantize(model, modelopt_config(FORMATS[name], group_size=4))
    mtq.calibrate(model, algorithm="max", forward_loop=lambda m: m(inputs))
    return model


def rounded(values: Tensor, amax: Tensor, bits: int) -> Tensor:
    """To the integers of so many bits and back, by hand."""
    highest = 2 ** (bits - 1) - 1
    return (values / amax * highest).round().clamp(-highest - 1, highest) * amax / highest


@pytest.mark.parametrize("name", list(FORMATS))
def test_only_the_decoders_linears_get_quantizers(inputs: Tensor, name: FormatName) -> None:
    """Of weights, and of inputs where the format has such; not the head, and not the tower's of the same names."""
    kinds = ["weight"] if name.endswith("weight_only") else ["weight", "input"]

    model = quantized(name, inputs)

    assert {found for found, _ in enabled_quantizers(model)} == {
        f"layer.{linear}.{kind}_quantizer" for linear in NAMES for kind in kinds
    }


@pytest.mark.parametrize("name", ["int8", "int8_dynamic", "int8_weight_only"])
def test_weights_of_8_bits_have_a_scale_for_each_output(inputs: Tensor, name: FormatName) -> None:
    linear = quantized(name, inputs).layer.q_proj
    weight = linear.weight.detach()

    found = linear.weight_quantizer(linear.weight).detach()

    torch.testing.assert_close(found, rounded(weight, weight.abs().amax(1, keepdim=True), 8))


@pytest.mark.parametrize(("name", "bits"), [("int4_weight_only", 4), ("w4a8", 4), ("w3a8", 3)])
def test_weights_of_few_bits_have_a_scale_for_each_group_of_inputs(inputs: Tensor, name: FormatName, bits: int) -> None:
    linear = quantized(name, inputs).layer.q_proj
    blocks = linear.weight.detach().view(8, 2, 4)

    found = linear.weight_quantizer(linear.weight).detach()

    torch.testing.assert_close(found.view(8, 2, 4), rounded(blocks, blocks.abs().amax(2, keepdim=True), bits))


def test_static_inputs_have_the_scale_of_the_calibration_set(inputs: Tensor) -> None:
    """Whatever they are now; the first Linear of the tower is not quantized, so it says what the layer reads."""
    model = quantized("int8", inputs)
    largest = model.audio_tower(inputs).abs().max()

    found = model.layer.q_proj.input_quantizer(inputs[:4] * 3)

    torch.testing.assert_close(found, rounded(inputs[:4] * 3, largest, 8))


@pytest.mark.parametrize("name", ["int8_dynamic", "w4a8", "w3a8"])
@pytest.mark.parametrize("shape", [(1, 32, 8), (4, 8, 8)])
def test_dynamic_inputs_have_a_scale_for_each_token(inputs: Tensor, name: FormatName, shape: tuple[int, ...]) -> None:
    """As the decoder's layers pass them, and after another shape has been seen."""
    quantizer = quantized(name, inputs[None]).layer.q_proj.input_quantizer
    quantizer(inputs[None, :5])
    tokens = inputs.view(shape)

    found = quantizer(tokens)

    torch.testing.assert_close(found, rounded(tokens, tokens.abs().amax(-1, keepdim=True), 8))


def test_e4m3_has_one_scale_for_the_weights_and_one_for_the_inputs(inputs: Tensor) -> None:
    model = quantized("fp8", inputs)
    linear, reads = model.layer.q_proj, model.audio_tower(inputs).detach()

    for quantizer, values in ((linear.weight_quantizer, linear.weight.detach()), (linear.input_quantizer, reads)):
        scale = values.abs().max() / 448
        expected = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        found = quantizer(values).detach()
        # A quotient that is rounded otherwise may fall to the next value of 3 bits of mantissa.
        assert float((found - expected).abs().gt(1e-6).float().mean()) < 0.02


def test_library_preset_is_not_changed() -> None:
    before = copy.deepcopy(mtq.INT8_DEFAULT_CFG)

    configs = [modelopt_config(recipe, group_size=128) for recipe in FORMATS.values()]

    assert before == mtq.INT8_DEFAULT_CFG
    assert configs == [modelopt_config(recipe, group_size=128) for recipe in FORMATS.values()]  # nothing piles up
    assert all(config["algorithm"] is None for config in configs)
