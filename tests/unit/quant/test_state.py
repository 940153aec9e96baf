"""Quantizers counted, checked, hashed and measured in bytes."""

import copy
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.quant.state import (
    check_quantizers,
    enable_checkpointing,
    enabled_quantizers,
    fold_weights,
    int8_bytes,
    quantizer_hash,
)
from shards.errors import ModelError
from tests.helpers.quantized import NUM_LAYERS, NUM_QUANTIZERS, logits_of
from tests.helpers.qwen import load

# Weights of the embedded teacher, counted by hand from its config: width 128, 4 and 2 heads of 32, inner width 384.
LINEAR_WEIGHTS = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)
LINEAR_ROWS = 3 * (128 + 64 + 64 + 128 + 384 + 384 + 128)
NORM_WEIGHTS = 3 * (128 + 128 + 32 + 32) + 128
EMBEDDING_WEIGHTS = 1024 * 128  # the head is the same tensor
CONVOLUTION_WEIGHTS = (16 * 9 + 16) + 2 * (16 * 16 * 9 + 16) + 16 * 16 * 144
TOWER_LAYER_WEIGHTS = 4 * (144 * 144 + 144) + 2 * 2 * 144 + (144 * 576 + 576) + (576 * 144 + 144)
TOWER_WEIGHTS = CONVOLUTION_WEIGHTS + 4 * TOWER_LAYER_WEIGHTS + 2 * 144 + (144 * 144 + 144) + (144 * 128 + 128)


def quantizer(model: AsrModel, name: str) -> torch.nn.Module:
    return model.model.get_submodule(f"thinker.model.layers.{name}")


def test_student_has_a_weight_and_an_input_quantizer_for_each_decoder_linear(student: AsrModel) -> None:
    assert check_quantizers(student.model, num_layers=NUM_LAYERS) == NUM_QUANTIZERS
    names = [name for name, _ in enabled_quantizers(student.model)]
    assert len(set(names)) == NUM_QUANTIZERS
    assert all(name.startswith("thinker.model.layers.") for name in names)


def test_part_that_holds_the_layers_is_checked_like_the_whole(student: AsrModel) -> None:
    assert check_quantizers(student.decoder, num_layers=NUM_LAYERS) == NUM_QUANTIZERS


def test_model_without_quantizers_is_refused(nano: AsrModel) -> None:
    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers .*, got 0; load a local folder"):
        check_quantizers(nano.model, num_layers=NUM_LAYERS)


def test_missing_quantizer_is_refused(new_student: AsrModel) -> None:
    quantizer(new_student, "1.mlp.up_proj.input_quantizer").disable()

    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers .*, got 41"):
        check_quantizers(new_student.model, num_layers=NUM_LAYERS)


def test_quantizer_in_the_audio_tower_is_refused_by_name(new_student: AsrModel) -> None:
    """Also when the count is right."""
    quantizer(new_student, "1.mlp.up_proj.input_quantizer").disable()
    new_student.audio_tower.layers[0].self_attn.q_proj.input_quantizer.enable()

    with pytest.raises(ModelError, match=r"only the decoder's Linears may be quantized, got .*audio_tower.*q_proj"):
        check_quantizers(new_student.model, num_layers=NUM_LAYERS)


def test_quantizer_of_the_head_is_refused_by_name(new_student: AsrModel) -> None:
    quantizer(new_student, "1.mlp.up_proj.input_quantizer").disable()
    new_student.model.thinker.lm_head.input_quantizer.enable()

    with pytest.raises(ModelError, match=r"only the decoder's Linears may be quantized, got .*lm_head"):
        check_quantizers(new_student.model, num_layers=NUM_LAYERS)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "input"])
def test_amax_that_is_no_positive_number_is_refused(new_student: AsrModel, kind: str, value: float) -> None:
    quantizer(new_student, f"2.mlp.down_proj.{kind}_quantizer")._amax.flatten()[0] = value

    with pytest.raises(ModelError, match=rf"layers\.2\.mlp\.down_proj\.{kind}_quantizer must have a finite, positive"):
        check_quantizers(new_student.model, num_layers=NUM_LAYERS)


def test_missing_amax_is_refused(new_student: AsrModel) -> None:
    quantizer(new_student, "0.self_attn.o_proj.input_quantizer").reset_amax()

    with pytest.raises(ModelError, match=r"o_proj\.input_quantizer must have a finite, positive amax, got none"):
        check_quantizers(new_student.model, num_layers=NUM_LAYERS)


def test_smoothing_that_was_not_folded_is_refused(new_student: AsrModel) -> None:
    owner = quantizer(new_student, "0.self_attn.q_proj.input_quantizer")
    owner._enable_pre_quant_scale = True
    owner.register_buffer("_pre_quant_scale", torch.ones(128))

    with pytest.raises(ModelError, match=r"q_proj\.input_quantizer must have its pre_quant_scale folded away"):
        check_quantizers(new_student.model, num_layers=NUM_LAYERS)


def test_hash_is_of_quantizers_and_not_of_weights(student: AsrModel, new_student: AsrModel) -> None:
    assert quantizer_hash(new_student.model) == quantizer_hash(student.model)  # calibrated on the same data

    with torch.no_grad():
        for parameter in new_student.model.parameters():
            parameter += 1

    assert quantizer_hash(new_student.model) == quantizer_hash(student.model)


@pytest.mark.parametrize("name", ["0.self_attn.q_proj.input_quantizer", "2.mlp.up_proj.weight_quantizer"])
def test_hash_notices_the_last_bit_of_one_amax(student: AsrModel, new_student: AsrModel, name: str) -> None:
    amax = quantizer(new_student, name)._amax.view(-1)
    amax[-1] = torch.nextafter(amax[-1], torch.tensor(torch.inf))

    assert quantizer_hash(new_student.model) != quantizer_hash(student.model)


def test_hash_notices_a_quantizer_that_is_switched_off_and_swapped_values(
    student: AsrModel, new_student: AsrModel
) -> None:
    q, k = (quantizer(new_student, f"0.self_attn.{name}_proj.weight_quantizer") for name in ("q", "k"))
    first, second = q._amax.view(-1), k._amax.view(-1)
    first[0], second[0] = second[0].clone(), first[0].clone()
    assert quantizer_hash(new_student.model) != quantizer_hash(student.model)
    first[0], second[0] = second[0].clone(), first[0].clone()
    assert quantizer_hash(new_student.model) == quantizer_hash(student.model)

    q.disable()

    assert quantizer_hash(new_student.model) != quantizer_hash(student.model)


def test_folder_whose_state_file_is_lost_does_not_load_as_a_student(student: AsrModel, tmp_path: Path) -> None:
    enable_checkpointing()
    save_checkpoint(student.model, tmp_path / "student", base=student.folder, dtype="float32")
    assert check_quantizers(load(tmp_path / "student", quantized=True).model, num_layers=NUM_LAYERS) == NUM_QUANTIZERS

    (tmp_path / "student" / "modelopt_state.pth").unlink()

    with pytest.raises(ModelError, match=r"must have modelopt_state\.pth here, got no such file"):
        load(tmp_path / "student", quantized=True)
    # Nor as a teacher: its weights are smoothed and trained for the quantizers that it has lost.
    with pytest.raises(ModelError, match=r"no place for, got 42, first thinker\.model\..*_quantizer\._amax; copy all"):
        load(tmp_path / "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_size_is_one_byte_a_weight_and_a_scale_a_row_and_bfloat16_for_the_rest(
    new_student: AsrModel, dtype: torch.dtype
) -> None:
    new_student.model.to(dtype)

    others = NORM_WEIGHTS + EMBEDDING_WEIGHTS + TOWER_WEIGHTS
    assert int8_bytes(new_student.model) == LINEAR_WEIGHTS + 4 * LINEAR_ROWS + 2 * others == 3_037_920


def test_model_without_quantizers_has_its_full_size(nano: AsrModel) -> None:
    assert int8_bytes(nano.model) == 2 * sum(parameter.numel() for parameter in nano.model.parameters())


def test_folded_weights_compute_the_same_and_lie_on_the_int8_grid(
    student: AsrModel, new_student: AsrModel, unseen: Batch
) -> None:
    before = copy.deepcopy(dict(new_student.decoder.layers[0].mlp.up_proj.named_parameters()))

    fold_weights(new_student.model)

    assert torch.equal(logits_of(new_student, unseen), logits_of(student, unseen))
    up_proj = new_student.decoder.layers[0].mlp.up_proj
    scale = quantizer(student, "0.mlp.up_proj.weight_quantizer")._amax.view(-1, 1) / 127
    steps = up_proj.weight / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert not torch.equal(up_proj.weight, before["weight"])


def test_recipe_that_forgets_the_audio_tower_is_refused(
    load_nano: Callable[..., AsrModel], batches: list[Batch]
) -> None:
    """ModelOpt's own preset leaves out the LM head but not the tower."""
    model = load_nano()

    mtq.quantize(model.model, mtq.INT8_SMOOTHQUANT_CFG, forward_loop=lambda _: logits_of(model, batches[0]))

    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers"):
        check_quantizers(model.model, num_layers=NUM_LAYERS)
