"""Integers compute what ModelOpt's fake quantization promises: its codes bit for bit, its outputs up to rounding."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qad_dist.quant.int8 import Int8Linear, int8_product
from shards.errors import ModelError
from tests.helpers.int8 import HALF_ULP, PER_TOKEN, assert_as_promised

WEIGHT, INPUT = "*weight_quantizer", "*input_quantizer"


def changed(*rules: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's INT8 preset with these rules behind its own."""
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    config["quant_cfg"].extend(rules)
    return config


def recipe_for(scale: str) -> dict[str, Any]:
    """With one scale per ``tensor`` or ``token`` for inputs."""
    rule = {"quantizer_name": INPUT, "cfg": PER_TOKEN}
    return changed(rule) if scale == "token" else changed()


def quantized(
    weight: Tensor, calibration: Tensor, *, bias: Tensor | None = None, config: dict[str, Any] | None = None
) -> Any:
    """A Linear with this weight, quantized by ModelOpt."""
    outputs, channels = weight.shape
    holder = nn.Sequential(nn.Linear(channels, outputs, bias=bias is not None, dtype=weight.dtype))
    with torch.no_grad():
        holder[0].weight.copy_(weight)
        if bias is not None:
            holder[0].bias.copy_(bias)
    mtq.quantize(holder, config or changed(), forward_loop=lambda model: model(calibration))
    return holder[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near_ties(amax_O: Tensor) -> Tensor:
    """Rows of one amax each that hold it and, next to every point between two codes, the floats on both sides of it."""
    ties_I = torch.arange(-127, 128) + 0.5
    rows = ties_I * (amax_O[:, None] / 127)
    below, above = (torch.nextafter(rows, torch.tensor(side * torch.inf)) for side in (-1, 1))
    rows = torch.cat([rows, below, above], dim=1).clamp(-amax_O[:, None], amax_O[:, None])
    return torch.cat([rows, amax_O[:, None]], dim=1)


def values_of(codes: Tensor, amax: Tensor) -> Tensor:
    """What ModelOpt makes of codes in float32, written down from its source: the code divided by 127 / amax."""
    factor = np.float32(127) / amax.float().numpy()
    return torch.from_numpy(codes.numpy().astype(np.float32) / factor)


def test_weight_codes_are_modelopts_bit_for_bit() -> None:
    """Also where the last bit of 127 / amax decides."""
    weight_OI = near_ties(random(300).abs() + 1e-3)
    linear = quantized(weight_OI, random(2, weight_OI.shape[1]))

    int8 = Int8Linear.from_quantized(linear)

    assert int8.weight_codes_OI.dtype == torch.int8
    fake_OI = linear.weight_quantizer(linear.weight)
    assert torch.equal(values_of(int8.weight_codes_OI, linear.weight_quantizer._amax), fake_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amax", [1.0, 1.3, 6.1, 127.0])  # 1.3, 6.1: 127 / amax is not 1 / (amax / 127)
def test_input_codes_are_modelopts_with_a_static_scale(amax: float, dtype: torch.dtype) -> None:
    """Beyond amax too: there codes end at 127 and -128."""
    inputs_NI = torch.cat([near_ties(torch.tensor([amax])), 3 * amax * random(4, 766)]).to(dtype)
    linear = quantized(random(5, 766), torch.full((1, 766), amax))
    linear_float32 = copy.deepcopy(linear)

    codes_NI, scale = Int8Linear.from_quantized(linear).quantize_input(inputs_NI)

    fake_NI = linear_float32.input_quantizer(inputs_NI.float())
    assert torch.equal(values_of(codes_NI, linear.input_quantizer._amax), fake_NI)
    assert (int(codes_NI.min()), int(codes_NI.max())) == (-128, 127)
    assert float(scale) == np.float32(amax) / np.float32(127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_codes_are_modelopts_with_a_scale_per_token(dtype: torch.dtype) -> None:
    inputs_NI = near_ties(random(60).abs() + 1e-3).to(dtype)
    linear = quantized(random(5, 766), inputs_NI.float(), config=recipe_for("token"))

    codes_NI, scale_N1 = Int8Linear.from_quantized(linear).quantize_input(inputs_NI)

    amax_N1 = inputs_NI.float().abs().amax(1, keepdim=True)
    assert torch.equal(values_of(codes_NI, amax_N1), linear.input_quantizer(inputs_NI.float()))
    assert torch.equal(scale_N1, amax_N1 / 127)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 100), (17, 100), (2, 9, 100)])
@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_output_is_the_fake_quantized_one_up_to_rounding(scale: str, shape: tuple[int, ...], has_bias: bool) -> None:
    bias = random(37, seed=1) if has_bias else None
    inputs = random(*shape, seed=2)
    linear = quantized(random(37, 100, seed=3), inputs, bias=bias, config=recipe_for(scale))

    found = Int8Linear.from_quantized(linear)(inputs)

    assert found.shape == (*shape[:-1], 37)
    assert_as_promised(found, linear, inputs)


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_output_is_that_of_numpys_integers(scale: str) -> None:
    inputs_NI = random(17, 3072, seed=2)
    linear = quantized(random(64, 3072, seed=3), inputs_NI, config=recipe_for(scale))
    int8 = Int8Linear.from_quantized(linear)

    found_NO = int8(inputs_NI)

    codes_NI, scale_of_inputs = int8.quantize_input(inputs_NI)
    sums_NO = codes_NI.numpy().astype(np.int64) @ int8.weight_codes_OI.numpy().astype(np.int64).T
    scales = scale_of_inputs.double().numpy() * int8.weight_scale_O.double().numpy()
    np.testing.assert_allclose(found_NO.double().numpy(), sums_NO * scales, rtol=4 * HALF_ULP, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("is_padded", [False, True])
def test_sums_are_exact_at_their_largest(is_padded: bool, rows: int, sign: int) -> None:
    """Odd and above 2**24: float32 does not have them, and pairs of products do not fit 16 bits."""
    codes_NI = torch.full((rows, 3072), 127, dtype=torch.int8)
    weight_codes_OI = torch.full((16, 3072), 127 * sign, dtype=torch.int8)
    weight_codes_OI[:, 5], codes_NI[:, 5] = 125, 125

    sums_NO = int8_product(codes_NI, weight_codes_OI, is_padded=is_padded)

    assert sums_NO.dtype == torch.int32
    assert set(sums_NO.flatten().tolist()) == {sign * 3071 * 127 * 127 + 125 * 125}


@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 24, 16), (33, 16, 8), (3, 13, 16), (40, 16, 5), (2, 7, 3)])
def test_padding_changes_no_sum(shape: tuple[int, int, int]) -> None:
    rows, channels, outputs = shape
    generator = torch.Generator().manual_seed(0)
    codes_NI = torch.randint(-128, 128, (rows, channels), dtype=torch.int8, generator=generator)
    weight_codes_OI = torch.randint(-128, 128, (outputs, channels), dtype=torch.int8, generator=generator)

    sums_NO = int8_product(codes_NI, weight_codes_OI, is_padded=True)

    expected_NO = codes_NI.numpy().astype(np.int64) @ weight_codes_OI.numpy().astype(np.int64).T
    np.testing.assert_array_equal(sums_NO.numpy(), expected_NO)


def test_padded_operands_are_what_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 rows, multiples of 8."""
    seen, product = [], torch._int_mm

    def look(left: Tensor, right: Tensor) -> Tensor:
        seen.append((*left.shape, right.shape[1]))
        return product(left, right)

    monkeypatch.setattr(torch, "_int_mm", look)
    for rows, channels, outputs in [(1, 7, 3), (16, 8, 8), (17, 9, 16), (64, 1024, 1)]:
        ones = (torch.ones(rows, channels, dtype=torch.int8), torch.ones(outputs, channels, dtype=torch.int8))
        int8_product(*ones, is_padded=True)

    assert seen
    assert all(rows > 16 and channels % 8 == 0 and outputs % 8 == 0 for rows, channels, outputs in seen)


@pytest.mark.parametrize("has_run", [False, True])
def test_scale_per_token_is_also_known_by_its_block_sizes(has_run: bool) -> None:
    """ModelOpt turns them into axes when it runs."""
    inputs = random(2, 9, 100, seed=2)
    rule = {"quantizer_name": INPUT, "cfg": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}}
    linear = quantized(random(37, 100), inputs, config=changed(rule))
    if not has_run:
        linear.input_quantizer.block_sizes = {-1: None}

    found = Int8Linear.from_quantized(linear)(inputs)

    assert_as_promised(found, linear, inputs)


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_bfloat16_output_is_rounded_once(scale: str) -> None:
    """Everything between the codes and the output is float32."""
    inputs = random(17, 96, seed=2).bfloat16()
    linear = quantized(
        random(40, 96, seed=3).bfloat16(), inputs, bias=random(40, seed=1).bfloat16(), config=recipe_for(scale)
    )
    int8 = Int8Linear.from_quantized(linear)

    found = int8(inputs)

    assert found.dtype == torch.bfloat16
    assert torch.equal(found, int8(inputs.float()).bfloat16())
    linear.float()
    assert_as_promised(int8(inputs.float()), linear, inputs.float())


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_output_does_not_depend_on_how_the_input_lies_in_memory(scale: str) -> None:
    inputs_IN = random(96, 40, seed=2)
    int8 = Int8Linear.from_quantized(quantized(random(24, 96), inputs_IN.T, config=recipe_for(scale)))

    assert torch.equal(int8(inputs_IN.T), int8(inputs_IN.T.contiguous()))
    assert torch.equal(int8(inputs_IN.T[::3]), int8(inputs_IN.T)[::3])


def test_silent_rows_of_a_weight_give_nothing_but_the_bias() -> None:
    """As ModelOpt has it: amax 0, and amax up to 2**-24."""
    weight_OI, inputs = random(4, 32), random(5, 32, seed=1)
    weight_OI[0] = 0
    weight_OI[1] = 2.0**-24
    weight_OI[2] = 2.0**-23
    linear = quantized(weight_OI, inputs, bias=torch.tensor([1.0, 2.0, 3.0, 4.0]))

    int8 = Int8Linear.from_quantized(linear)

    assert int8.weight_codes_OI.abs().amax(1).tolist() == [0, 0, 127, 127]
    assert int8(inputs)[:, :2].tolist() == [[1.0, 2.0]] * 5
    assert_as_promised(int8(inputs), linear, inputs)


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_silent_inputs_give_nothing(scale: str) -> None:
    inputs = torch.zeros(3, 32)
    inputs[1] = 2.0**-24
    linear = quantized(random(4, 32), inputs, config=recipe_for(scale))

    found = Int8Linear.from_quantized(linear)(inputs)

    assert found.tolist() == F.linear(linear.input_quantizer(inputs), linear.weight).tolist() == [[0.0] * 4] * 3


def test_token_has_the_same_output_in_any_company() -> None:
    inputs = random(17, 96, seed=2) * torch.arange(1, 18)[:, None]
    int8 = Int8Linear.from_quantized(quantized(random(24, 96), inputs, config=recipe_for("token")))

    assert torch.equal(torch.cat([int8(inputs[i : i + 1]) for i in range(17)]), int8(inputs))


def test_vector_is_a_single_token() -> None:
    inputs = random(17, 96, seed=2)
    int8 = Int8Linear.from_quantized(quantized(random(24, 96), inputs))

    assert torch.equal(int8(inputs[3]), int8(inputs)[3])


def test_no_tokens_give_no_outputs() -> None:
    int8 = Int8Linear.from_quantized(quantized(random(24, 96), random(5, 96)))

    assert int8(torch.zeros(0, 96)).shape == (0, 24)


def test_scales_stay_float32_when_a_model_is_cast() -> None:
    linear = quantized(random(24, 96), random(5, 96), bias=random(24))
    int8, inputs = Int8Linear.from_quantized(linear), random(7, 96, seed=5).bfloat16()
    before = copy.deepcopy(int8)

    nn.Sequential(int8).to(torch.bfloat16)

    assert int8.bias_O is not None
    assert int8.bias_O.dtype == torch.bfloat16
    for name in ("weight_scale_O", "input_scale", "input_factor", "weight_codes_OI"):
        assert torch.equal(getattr(int8, name), getattr(before, name)), name
        assert getattr(int8, name).dtype == getattr(before, name).dtype, name
    assert torch.equal(int8.quantize_input(inputs)[0], before.quantize_input(inputs)[0])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"quantizer_name": WEIGHT, "cfg": {"num_bits": 4, "axis": 0}}],
            "weight_quantizer must have num_bits 8, got 4",
        ),
        ([{"quantizer_name": INPUT, "cfg": {"num_bits": 4}}], "input_quantizer must have num_bits 8, got 4"),
        (
            [{"quantizer_name": INPUT, "cfg": {"num_bits": (4, 3)}}],
            r"input_quantizer must have num_bits 8, got \(4, 3\)",
        ),
        ([{"quantizer_name": INPUT, "enable": False}], "input_quantizer must be one enabled quantizer, got .*disabled"),
        (
            [{"quantizer_name": WEIGHT, "cfg": {"num_bits": 8}}],
            "weight_quantizer must have one static scale per output",
        ),
        (
            [{"quantizer_name": WEIGHT, "cfg": {"num_bits": 8, "block_sizes": {-1: 16}}}],
            "weight_quantizer must have one static scale per output channel",
        ),
        (
            [{"quantizer_name": WEIGHT, "cfg": [{"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": 0}]}],
            "weight_quantizer must be one enabled quantizer, got SequentialQuantizer",
        ),
        (
            [{"quantizer_name": INPUT, "cfg": {"num_bits": 8, "axis": 1}}],
            "input_quantizer must have one static scale, or",
        ),
        (
            [{"quantizer_name": INPUT, "cfg": {"num_bits": 8, "type": "dynamic"}}],
            "input_quantizer must have one dynamic scale per token, got axis None",
        ),
        (
            [{"quantizer_name": INPUT, "cfg": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: 16}}}],
            "input_quantizer must have one dynamic scale per token",
        ),
        (
            [{"quantizer_name": INPUT, "cfg": {"num_bits": 8, "narrow_range": True}}],
            "input_quantizer must have codes from -128, got narrow_range",
        ),
        ([{"quantizer_name": "*output_quantizer", "cfg": {"num_bits": 8}}], "output_quantizer must be off, got"),
    ],
)
def test_other_formats_are_refused(rules: list[dict[str, Any]], message: str) -> None:
    linear = quantized(random(24, 96), random(5, 96), config=changed(*rules))

    with pytest.raises(ModelError, match=rf"layers\.0\.up\.{message}"):
        Int8Linear.from_quantized(linear, name="layers.0.up")


def test_plain_linear_is_refused() -> None:
    with pytest.raises(ModelError, match="the Linear.weight_quantizer must be one enabled quantizer, got none"):
        Int8Linear.from_quantized(nn.Linear(8, 8))


def test_smoothing_that_was_not_folded_is_refused() -> None:
    inputs = random(5, 96)
    linear = quantized(random(24, 96), inputs, config=copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG))

    with pytest.raises(ModelError, match="input_quantizer must have its pre_quant_scale folded away, got one"):
        Int8Linear.from_quantized(linear)


@pytest.mark.parametrize("part", ["weight_quantizer", "input_quantizer"])
@pytest.mark.parametrize("damage", ["none", "nan", "-1"])
def test_quantizer_without_a_usable_amax_is_refused(part: str, damage: str) -> None:
    linear = quantized(random(24, 96), random(5, 96))
    quantizer = getattr(linear, part)
    if damage == "none":
        quantizer.reset_amax()
    else:
        quantizer._amax.view(-1)[0] = float(damage)

    with pytest.raises(ModelError, match=rf"{part} must have (24|1) finite amax, got .*{damage}"):
        Int8Linear.from_quantized(linear)
