"""Fake quantization that keeps ModelOpt's bits, asks the device for nothing, compiles whole, and is never saved."""

import importlib.util
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend, unregister_quant_backend
from modelopt.torch.quantization.tensor_quant import _tensor_quant, fake_tensor_quant
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from qad_dist.asr.decoder import EmbeddedBatch, embed
from qad_dist.asr.load import AsrModel
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.quant import fake_quant as module
from qad_dist.quant.fake_quant import (
    BACKEND,
    FakeQuantPaths,
    fake_quant,
    use_fast_fake_quant,
    use_modelopt_fake_quant,
    without_backend,
)
from qad_dist.quant.state import enable_checkpointing, enabled_quantizers
from tests.helpers.operators import WAITING, count_operators
from tests.helpers.quantized import NUM_LAYERS, NUM_QUANTIZERS, logits_of

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


def random_values(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Many scales, and among them both zeros and values far beyond the rest."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random) * torch.randn(shape, generator=random).exp()
    values.view(-1)[:4] = torch.tensor([0.0, -0.0, 300.0, -300.0])
    return values.to(dtype)


def random_amax(layout: str, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.empty(LAYOUTS[layout]).uniform_(0.5, 4.0, generator=random).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """To compare: tells 0.0 from -0.0, and a NaN is equal to itself."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def new_quantizer(config: dict[str, Any]) -> TensorQuantizer:
    return TensorQuantizer(QuantizerAttributeConfig(**config))


def calibrated(config: dict[str, Any], values: Tensor) -> TensorQuantizer:
    """As ModelOpt's ``max`` calibration leaves it, on values of which some will lie outside the range."""
    quantizer = new_quantizer(config)
    if config.get("type") != "dynamic":
        quantizer.disable_quant()
        quantizer.enable_calib()
        quantizer(values.clamp(-1.5, 1.5))
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    return quantizer


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


def test_log_says_in_one_line_that_all_quantizers_run_the_fast_path(
    new_student: AsrModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qad_dist"):
        use_fast_fake_quant(new_student.model)

    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "event=fake_quant path=qad quantizers=42 modelopt=0")
    ]


def test_formats_that_stay_with_modelopt_are_counted_and_warned_of(
    new_student: AsrModel, caplog: pytest.LogCaptureFixture
) -> None:
    mlp = new_student.decoder.layers[1].mlp
    mlp.gate_proj.input_quantizer.num_bits = (4, 3)
    mlp.up_proj.input_quantizer.num_bits = (4, 3)
    mlp.down_proj.input_quantizer.unsigned = True

    with caplog.at_level(logging.INFO, "qad_dist"):
        found = use_fast_fake_quant(new_student.model)

    assert found == FakeQuantPaths(num_qad=NUM_QUANTIZERS - 3, num_modelopt=3)
    assert mlp.up_proj.input_quantizer.backend is None
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    info, warning = (record.message for record in caplog.records)
    assert info == "event=fake_quant path=qad+modelopt quantizers=42 modelopt=3"
    extension = "yes" if torch.cuda.is_available() else "no"
    assert warning == (
        "event=fake_quant_by_modelopt quantizers=3 first=thinker.model.layers.1.mlp.gate_proj.input_quantizer "
        f'why="num_bits (4, 3): 2, unsigned: 1" cuda_extension={extension}'
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_bits": 8, "fake_quant": False}, "packed weights: 1"),
        ({"num_bits": 8, "bias": {-1: None, "type": "dynamic"}}, "bias: 1"),
        ({"num_bits": 8, "backend": "someone_elses"}, "backend someone_elses: 1"),
        ({"num_bits": 8, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}, "dynamic blocks: 1"),
    ],
)
def test_what_our_formula_does_not_know_stays_with_modelopt(
    config: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    quantizer = new_quantizer(config)
    before = quantizer.backend

    assert use_fast_fake_quant(quantizer) == FakeQuantPaths(num_qad=0, num_modelopt=1)

    assert quantizer.backend == before
    assert f'why="{why}"' in caplog.text
    assert use_modelopt_fake_quant(quantizer) == 0
    assert quantizer.backend == before


def test_blocks_of_weights_are_fast_as_modelopt_leaves_them_unless_their_scales_are_learned() -> None:
    blocks = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}}
    model = nn.Sequential(nn.Linear(96, 64))
    mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}, blocks], "algorithm": "max"})
    inputs = random_values((5, 96), torch.float32)
    expected = model(inputs)

    assert use_fast_fake_quant(model) == FakeQuantPaths(num_qad=1, num_modelopt=0)
    assert torch.equal(model(inputs), expected)

    use_modelopt_fake_quant(model)
    model[0].weight_quantizer.enable_lsq(quantize_scales=False)
    assert use_fast_fake_quant(model) == FakeQuantPaths(num_qad=0, num_modelopt=1)


def test_subclass_that_computes_otherwise_stays_with_modelopt(caplog: pytest.LogCaptureFixture) -> None:
    class Doubling(TensorQuantizer):
        def _fake_quantize(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    assert use_fast_fake_quant(Doubling()) == FakeQuantPaths(num_qad=0, num_modelopt=1)
    assert 'why="Doubling: 1"' in caplog.text


def test_integer_member_of_a_chain_of_quantizers_is_fast_and_the_other_stays(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_values((16, 96), torch.float32)
    blocks = calibrated({"num_bits": 4, "block_sizes": {-1: 32}}, weight)
    chain = SequentialQuantizer(blocks, calibrated({"num_bits": (4, 3)}, weight))
    expected = chain(weight)

    assert use_fast_fake_quant(chain) == FakeQuantPaths(num_qad=1, num_modelopt=1)

    assert (chain[0].backend, chain[1].backend) == (BACKEND, None)
    assert torch.equal(chain(weight), expected)
    assert 'first=1 why="num_bits (4, 3): 1"' in caplog.text


def test_disabled_quantizers_are_left_alone(new_student: AsrModel) -> None:
    use_fast_fake_quant(new_student.model)

    assert new_student.model.thinker.lm_head.input_quantizer.backend is None


def test_backend_is_registered_once_also_when_the_module_is_imported_again() -> None:
    spec = importlib.util.spec_from_file_location("imported_again", str(module.__file__))
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = again
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        spec.loader.exec_module(again)
        for use in (use_fast_fake_quant, again.use_fast_fake_quant, use_fast_fake_quant):
            use(new_quantizer({"num_bits": 8}))
    del sys.modules[spec.name]


def test_taking_it_back_restores_modelopts_own_path_and_no_one_elses(
    student: AsrModel, new_student: AsrModel, unseen: Batch
) -> None:
    register_quant_backend("someone_elses", lambda inputs, _: inputs)
    try:
        other = new_student.decoder.layers[0].mlp.up_proj.input_quantizer
        other.backend = "someone_elses"
        use_fast_fake_quant(new_student.model)
        # Once fast, it stays so while it is disabled.
        new_student.decoder.layers[1].mlp.up_proj.input_quantizer.disable()

        assert use_modelopt_fake_quant(new_student.model) == NUM_QUANTIZERS - 1

        new_student.decoder.layers[1].mlp.up_proj.input_quantizer.enable()
        assert [quantizer.backend for _, quantizer in enabled_quantizers(new_student.model) if quantizer.backend] == [
            "someone_elses"
        ]
    finally:
        unregister_quant_backend("someone_elses")
    other.backend = None
    with count_operators() as operators:
        assert torch.equal(logits_of(new_student, unseen), logits_of(student, unseen))
    assert operators["_local_scalar_dense"] >= 3 * NUM_QUANTIZERS


def test_backend_is_gone_inside_and_back_after_the_block_also_after_an_error(new_student: AsrModel) -> None:
    use_fast_fake_quant(new_student.model)
    inside = set()

    def save() -> None:
        with without_backend(new_student.model):
            inside.update(quantizer.backend for _, quantizer in enabled_quantizers(new_student.model))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()

    assert inside == {None}
    assert [quantizer.backend for _, quantizer in enabled_quantizers(new_student.model)] == [BACKEND] * NUM_QUANTIZERS


ELSEWHERE = """
import sys

import modelopt.torch.opt as mto
import qwen_asr
import torch
from transformers import AutoModel

mto.enable_huggingface_checkpointing()
saved_plainly, saved_without_backend, expected = sys.argv[1:]
inputs, output = torch.load(expected)
for folder in (saved_without_backend, saved_plainly):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    try:
        found = model.thinker.model.layers[0].mlp.up_proj(inputs)
        print("result: equal" if torch.equal(found, output) else "result: unequal")
    except KeyError as error:
        print("result:", error.args[0])
assert "qad_dist" not in sys.modules
"""


def test_folder_saved_without_the_backend_loads_where_this_project_is_unknown(
    new_student: AsrModel, tmp_path: Path
) -> None:
    """And saved with it, it does not: ModelOpt's state keeps the name."""
    enable_checkpointing()
    use_fast_fake_quant(new_student.model)
    plainly, without = tmp_path / "plainly", tmp_path / "without"
    save_checkpoint(new_student.model, plainly, base=new_student.folder, dtype="float32")
    with without_backend(new_student.model):
        save_checkpoint(new_student.model, without, base=new_student.folder, dtype="float32")
    inputs = torch.randn(1, 5, 128)
    torch.save((inputs, new_student.decoder.layers[0].mlp.up_proj(inputs).detach()), tmp_path / "expected.pt")

    arguments = [sys.executable, "-c", ELSEWHERE, str(plainly), str(without), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
    assert results == ["result: equal", f"result: Quant backend '{BACKEND}' is not registered."]
