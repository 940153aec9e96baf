"""Fake quantization that keeps ModelOpt's bits, asks the device for nothing, and compiles whole."""

from typing import Any

import numpy as np
import pytest
import torch
from modelopt.torch.quantization.tensor_quant import _tensor_quant, fake_tensor_quant
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from qad_dist.asr.decoder import EmbeddedBatch, embed
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.quant.fake_quant import (
    BACKEND,
    FakeQuantPaths,
    fake_quant,
    use_fast_fake_quant,
    use_modelopt_fake_quant,
)
from qad_dist.quant.state import enabled_quantizers
from tests.helpers.operators import WAITING, count_operators
from tests.helpers.quantized import NUM_LAYERS, NUM_QUANTIZERS, logits_of
from tests.helpers.quantizers import calibrated, new_quantizer, random_values

# Shape of amax for values of [4, 64, 96]: one scale, one for each row of weights, token or block of 32.
LAYOUTS = {"tensor": (), "scalar": (1, 1, 1), "channel": (4, 1, 1), "token": (4, 64, 1), "last": (1, 1, 96)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Of a TensorQuantizer, with the shape of what it quantizes. 96 is no multiple of 36: ModelOpt pads the last block.
QUANTIZERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tensor": ({"num_bits": 8}, (2, 64, 96)),
    "channel": ({"num_bits": 8, "axis": 0}, (128, 96)),
    "4-bit channel": ({"num_bits": 4, "axis": 0}, (128, 96)),
    "3-bit blocks": ({"num_bits": 3, "block_sizes": {-1: 32}}, (128, 96)),
    "4-bit padded blocks": ({"num_bits": 4, "block_sizes": {-1: 36}}, (128, 96)),
    "narrow": ({"num_bits": 4, "axis": 0, "narrow_range": True}, (128, 96)),
    "token": ({"num_bits": 8, "type": "dynamic", "axis": (-3, -2)}, (2, 64, 96)),
    "token as blocks": ({"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}, (2, 64, 96)),
    "whole input": ({"num_bits": 8, "type": "dynamic"}, (2, 64, 96)),
}


def random_amax(layout: str, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.empty(LAYOUTS[layout]).uniform_(0.5, 4.0, generator=random).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """To compare: tells 0.0 from -0.0, and a NaN is equal to itself."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def run(layer: Any, embedded: EmbeddedBatch, *, hidden_1ND: Tensor | None = None) -> Tensor:
    return layer(
        embedded.hidden_ND[None] if hidden_1ND is None else hidden_1ND,
        position_embeddings=(embedded.cos_1NE, embedded.sin_1NE),
        attention_mask=None,
        segments=embedded.segments,
    )


def gradients(layer: Any, output: Tensor) -> dict[str, Tensor]:
    """Of all parameters for one fixed gradient of the output."""
    layer.zero_grad()
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@pytest.fixture
def trainable(new_student: AsrModel) -> AsrModel:
    new_student.decoder.layers.requires_grad_(True)
    return new_student


@pytest.mark.parametrize("num_bits", [8, 4, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("narrow_range", [False, True])
def test_values_are_modelopts_to_the_last_bit(
    layout: str, dtype: torch.dtype, num_bits: int, narrow_range: bool
) -> None:
    values, amax = random_values((4, 64, 96), dtype), random_amax(layout, dtype)

    found = fake_quant(values, amax, num_bits=num_bits, narrow_range=narrow_range)

    expected = _tensor_quant(values, amax, num_bits, False, narrow_range)
    assert found.dtype == dtype
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_amax_is_at_most_2_to_the_minus_24_become_zero(dtype: torch.dtype) -> None:
    values = random_values((6, 96), dtype)
    above = float(np.nextafter(np.float32(2**-24), np.float32(1))) if dtype == torch.float32 else 2**-24 * (1 + 2**-7)
    amax = torch.tensor([[0.0], [1e-40], [2.0**-25], [2.0**-24], [above], [1.0]]).to(dtype)

    found = fake_quant(values, amax, num_bits=8)

    assert torch.equal(bits(found), bits(_tensor_quant(values, amax, 8, False, False)))
    assert not found[:4].any()
    assert found[4].any()


def test_values_round_to_even_and_end_at_minus_128_and_127() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.5, 1000.0, -127.4, -127.6, -1000.0])

    found = fake_quant(values, torch.tensor(127.0), num_bits=8)

    assert found.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, 127.0, 127.0, 127.0, -127.0, -128.0, -128.0]


def test_value_that_is_no_number_stays_one() -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])

    assert fake_quant(values, torch.tensor(1.27), num_bits=8).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("pass_through", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_modelopts_to_the_last_bit(layout: str, dtype: torch.dtype, pass_through: bool) -> None:
    ours, theirs = (random_values((4, 64, 96), dtype).requires_grad_(True) for _ in range(2))
    amax = random_amax(layout, dtype)
    with torch.no_grad():  # on the edge, which is inside
        for values in (ours, theirs):
            values[0, 0, 5] = amax.flatten()[0]
    gradient = random_values((4, 64, 96), dtype, seed=2)

    fake_quant(ours, amax, num_bits=8, pass_through=pass_through).backward(gradient)
    fake_tensor_quant(theirs, amax, None, 8, False, False, None, pass_through, None, None).backward(gradient)

    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(bits(ours.grad), bits(theirs.grad))
    assert torch.equal(ours.grad, gradient) == pass_through


@pytest.mark.parametrize(("pass_through", "saved"), [(True, 0), (False, 2)])
def test_only_a_masked_gradient_keeps_tensors_until_backward(pass_through: bool, saved: int) -> None:
    values = random_values((8, 96), torch.bfloat16).requires_grad_(True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quant(values, torch.ones(8, 1), num_bits=8, pass_through=pass_through)

    assert len(kept) == saved


@pytest.mark.parametrize("pass_through", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantizer_computes_and_differentiates_as_by_modelopt(
    kind: str, dtype: torch.dtype, pass_through: bool
) -> None:
    config, shape = QUANTIZERS[kind]
    values, gradient = random_values(shape, dtype), random_values(shape, dtype, seed=2)
    quantizer = calibrated({**config, "pass_through_bwd": pass_through}, values)
    theirs = values.clone().requires_grad_(True)
    expected = quantizer(theirs)
    expected.backward(gradient)

    assert use_fast_fake_quant(quantizer) == FakeQuantPaths(num_qad=1, num_modelopt=0)
    ours = values.clone().requires_grad_(True)
    found = quantizer(ours)
    found.backward(gradient)

    assert torch.equal(bits(found), bits(expected))
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(bits(ours.grad), bits(theirs.grad))
    assert not torch.equal(found, values)


@pytest.mark.parametrize("kind", ["token", "token as blocks"])
def test_dynamic_scale_is_that_of_each_token_for_any_batch_and_length(kind: str) -> None:
    quantizer = new_quantizer(QUANTIZERS[kind][0])
    use_fast_fake_quant(quantizer)

    for shape in [(2, 7, 96), (1, 64, 96), (3, 1, 96), (1, 1, 96)]:
        values = random_values(shape, torch.float32)
        found = quantizer(values)

        for found_C, values_C in zip(found.view(-1, 96).numpy(), values.view(-1, 96).numpy(), strict=True):
            scale = np.float32(127) / np.abs(values_C).max()
            assert np.array_equal(found_C, np.clip(np.rint(values_C * scale), -128, 127) / scale)


def test_whole_student_computes_the_same_bits(student: AsrModel, new_student: AsrModel, unseen: Batch) -> None:
    found = use_fast_fake_quant(new_student.model)

    assert found == FakeQuantPaths(num_qad=NUM_QUANTIZERS, num_modelopt=0)
    assert {quantizer.backend for _, quantizer in enabled_quantizers(new_student.model)} == {BACKEND}
    assert torch.equal(logits_of(new_student, unseen), logits_of(student, unseen))


def test_layer_never_waits_for_the_device_where_modelopts_own_path_does(trainable: AsrModel, unseen: Batch) -> None:
    layer, embedded = trainable.decoder.layers[0], embed(trainable, unseen)
    waits = []

    for choose in (use_modelopt_fake_quant, use_fast_fake_quant):
        choose(trainable.model)
        with count_operators() as operators:
            run(layer, embedded).sum().backward()
        waits.append(sum(operators[name] for name in WAITING))

    # 14 quantizers, each asking for the sign of amax and twice whether it is tiny.
    assert waits[0] >= 3 * 14
    assert waits[1] == 0


def test_per_token_quantizer_never_waits_for_the_device() -> None:
    quantizer = new_quantizer(QUANTIZERS["token"][0])
    use_fast_fake_quant(quantizer)

    with count_operators() as operators:
        quantizer(random_values((2, 7, 96), torch.float32))

    assert sum(operators[name] for name in WAITING) == 0
    assert operators["round_"] == 1


def test_layer_compiles_to_one_graph_that_keeps_every_bit_forward_and_backward(
    trainable: AsrModel, unseen: Batch
) -> None:
    layer, embedded = trainable.decoder.layers[0], embed(trainable, unseen)
    use_fast_fake_quant(trainable.model)
    output = run(layer, embedded)
    expected = gradients(layer, output)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    layer.compile(backend=counter, fullgraph=True)  # which refuses a break
    found = run(layer, embedded)

    assert torch.equal(found, output)
    found_gradients = gradients(layer, found)
    assert all(torch.equal(found_gradients[name], expected[name]) for name in expected)
    assert counter.frame_count == 1


def test_all_layers_and_lengths_share_one_graph(trainable: AsrModel, batches: list[Batch], unseen: Batch) -> None:
    use_fast_fake_quant(trainable.model)
    first, second = embed(trainable, batches[0]), embed(trainable, unseen)
    assert first.hidden_ND.shape != second.hidden_ND.shape
    torch._dynamo.reset()
    counter = CompileCounter()

    for layer in trainable.decoder.layers:
        expected = [run(layer, first), run(layer, second)]
        layer.compile(backend=counter, fullgraph=True)
        assert torch.equal(run(layer, first, hidden_1ND=of_any_length(first)), expected[0])
        assert torch.equal(run(layer, second, hidden_1ND=of_any_length(second)), expected[1])

    assert counter.frame_count == 1
    assert len(trainable.decoder.layers) == NUM_LAYERS


def of_any_length(embedded: EmbeddedBatch) -> Tensor:
    """Tells the compiler which sizes change; else it learns so at the second batch, by a second graph."""
    hidden_1ND, segments = embedded.hidden_ND[None].detach(), embedded.segments
    for tensor, axes in (
        (hidden_1ND, [1]),
        (embedded.cos_1NE, [1]),
        (embedded.sin_1NE, [1]),
        (segments.scatter_T, [0]),
        *((group.gather_GL, [0, 1]) for group in segments.groups),
        *((group.mask_G1LL, [0, 2, 3]) for group in segments.groups),
    ):
        torch._dynamo.mark_dynamic(tensor, axes)
    return hidden_1ND


def test_quantizer_compiles_whole_where_modelopts_own_path_breaks_the_graph() -> None:
    values = random_values((4, 96), torch.float32)
    quantizer = calibrated({"num_bits": 8}, values)
    expected = quantizer(values)
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent branching"):
        compiled(values)
    use_fast_fake_quant(quantizer)

    assert torch.equal(compiled(values), expected)


def test_fused_by_inductor_it_keeps_every_bit() -> None:
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        amax = torch.cat([torch.tensor([[0.0], [2.0**-24]]), torch.rand(62, 1) + 0.5])
        cases.append((random_values((64, 96), dtype), amax.to(dtype)))

    @torch.compile(fullgraph=True)
    def fused(cases: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [fake_quant(values, amax, num_bits=8) for values, amax in cases]

    for found, (values, amax) in zip(fused(cases), cases, strict=True):
        assert torch.equal(found, _tensor_quant(values, amax, 8, False, False))
