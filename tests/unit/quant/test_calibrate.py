"""Calibration: amax are the maxima of what was seen, in the dtype of use, and survive saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor

from qad_dist.asr.decoder import DecoderStack, embed
from qad_dist.asr.load import AsrModel
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.linears import LINEARS
from qad_dist.quant.calibrate import quantize_decoder
from qad_dist.quant.state import check_quantizers, enable_checkpointing, enabled_quantizers, quantizer_hash
from shards.errors import ModelError
from tests.helpers.quantized import NUM_LAYERS, logits_of, quantize
from tests.helpers.qwen import load


def largest_inputs(model: AsrModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Largest magnitude that each decoder Linear reads over the batches, with all quantizers off."""
    mtq.disable_quantizer(model.model, "*")
    largest: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        def hook(_: Any, args: tuple[Tensor]) -> None:
            largest[name] = torch.maximum(largest.get(name, torch.zeros(())), args[0].abs().max().float())

        return hook

    hooks = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.decoder.layers.named_modules()
        if name.endswith(LINEARS)
    ]
    for batch in batches:
        logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return largest


def amax_of(model: AsrModel) -> dict[str, Tensor]:
    return {name: quantizer._amax.float().clone() for name, quantizer in enabled_quantizers(model.decoder.layers)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax_are_the_maxima_over_all_batches(
    load_nano: Callable[..., AsrModel], batches: list[Batch], dtype: torch.dtype
) -> None:
    """Behind folding and behind the cast: per tensor for inputs, per output channel for weights."""
    student = quantize(load_nano(), *batches, dtype=dtype)
    amax = amax_of(student)
    assert {parameter.dtype for parameter in student.model.parameters()} == {dtype}

    largest = largest_inputs(student, batches)

    assert len(largest) == 7 * NUM_LAYERS
    for name, value in largest.items():
        assert torch.equal(amax[f"{name}.input_quantizer"].view(()), value), name
        weight = student.decoder.layers.get_submodule(name).weight.detach().float()
        assert torch.equal(amax[f"{name}.weight_quantizer"].flatten(), weight.abs().amax(1)), name


def test_every_batch_counts_and_their_order_does_not(load_nano: Callable[..., AsrModel], batches: list[Batch]) -> None:
    """A maximum over ranks or in another order is the same maximum."""
    forwards, backwards = (quantize(load_nano(), *order) for order in (batches, batches[::-1]))
    lacking = quantize(load_nano(), *batches[:2])

    assert quantizer_hash(forwards.model) == quantizer_hash(backwards.model)
    assert quantizer_hash(forwards.model) != quantizer_hash(lacking.model)


def test_bfloat16_student_is_measured_again_behind_the_cast(
    load_nano: Callable[..., AsrModel], student: AsrModel, batches: list[Batch]
) -> None:
    """The float32 scales, merely cast, would be other ones."""
    measured = amax_of(quantize(load_nano(), *batches, dtype=torch.bfloat16))

    cast = {name: amax.bfloat16().float() for name, amax in amax_of(student).items()}

    assert list(measured) == list(cast)
    assert any(not torch.equal(measured[name], cast[name]) for name in cast)
    for name, amax in measured.items():
        torch.testing.assert_close(amax, cast[name], rtol=0.15, atol=0, msg=name)


def test_quantizer_that_saw_no_data_is_refused_by_name(
    load_nano: Callable[..., AsrModel], batches: list[Batch]
) -> None:
    """A loop that forgets the last layer."""
    model = load_nano()

    @torch.no_grad()
    def forward_loop() -> None:
        embedded = embed(model, batches[0])
        stack = DecoderStack(model.decoder.layers[:-1])
        stack(embedded.hidden_ND, embedded.cos_1NE, embedded.sin_1NE, embedded.segments)

    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.q_proj\.input_quantizer must see calibration data"):
        quantize_decoder(model.model, model.decoder.layers, forward_loop, alpha=1.0, dtype=torch.float32)


def test_calibration_without_any_data_is_refused(load_nano: Callable[..., AsrModel]) -> None:
    model = load_nano()

    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.input_quantizer must see calibration data"):
        quantize_decoder(model.model, model.decoder.layers, lambda: None, alpha=1.0, dtype=torch.float32)


def test_quantization_changes_a_little_and_not_the_frozen_parts(
    student: AsrModel, nano: AsrModel, batches: list[Batch]
) -> None:
    before, after = logits_of(nano, batches[0]), logits_of(student, batches[0])

    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
    assert 0 < float(kl) < 0.01  # nats a token
    for name, parameter in nano.model.named_parameters():
        if ".layers." not in name or "audio_tower" in name:
            assert torch.equal(student.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_student_loads_with_the_same_logits_bit_for_bit(
    load_nano: Callable[..., AsrModel], batches: list[Batch], unseen: Batch, tmp_path: Path, dtype: torch.dtype
) -> None:
    student, name = quantize(load_nano(), *batches, dtype=dtype), str(dtype).removeprefix("torch.")
    enable_checkpointing()

    save_checkpoint(student.model, tmp_path / "student", base=student.folder, dtype=name)
    again = load(tmp_path / "student", dtype=name, quantized=True)

    assert check_quantizers(again.model, num_layers=NUM_LAYERS) == 42
    assert quantizer_hash(again.model) == quantizer_hash(student.model)
    assert torch.equal(logits_of(again, unseen), logits_of(student, unseen))
