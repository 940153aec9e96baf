"""Quantizers counted, checked, hashed and measured in bytes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.formats import FORMATS, FormatName
from qad_dist.linears import LINEARS
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.state import (
    QUANTIZATION,
    Quantization,
    check_quantizers,
    enable_checkpointing,
    enabled_quantizers,
    fold_from,
    fold_weights,
    keep_in_high_precision,
    linears_matching,
    quantizer_hash,
    read_quantization,
    served_bytes,
)
from shards.errors import ConfigError, ModelError
from shards.storage import write_json
from tests.helpers.quantized import INT8, NUM_LAYERS, NUM_QUANTIZERS, Calibrated, copied, logits_of
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
    assert check_quantizers(student.model, INT8) == NUM_QUANTIZERS
    names = [name for name, _ in enabled_quantizers(student.model)]
    assert len(set(names)) == NUM_QUANTIZERS
    assert all(name.startswith("thinker.model.layers.") for name in names)


def test_part_that_holds_the_layers_is_checked_like_the_whole(student: AsrModel) -> None:
    assert check_quantizers(student.decoder, INT8) == NUM_QUANTIZERS


def test_model_without_quantizers_is_refused(nano: AsrModel) -> None:
    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers .*, got 0; load a local folder"):
        check_quantizers(nano.model, INT8)


@pytest.mark.parametrize("name", ["int8_dynamic", "w4a8", "fp8"])
def test_student_of_another_format_is_refused(student: AsrModel, name: FormatName) -> None:
    """With as many quantizers: what stands beside the weights belongs to other weights."""
    with pytest.raises(ModelError, match=rf"_quantizer must be as {name} says, got num_bits 8, static; copy"):
        check_quantizers(student.model, replace(INT8, format=name))


def test_quantized_inputs_of_a_format_of_weights_only_are_refused(new_student: AsrModel) -> None:
    """Also when the count is right."""
    for number in range(NUM_LAYERS):
        for name in LINEARS:
            quantizer(new_student, f"{number}.{name}.input_quantizer").disable()
    quantizer(new_student, "0.mlp.up_proj.input_quantizer").enable()
    quantizer(new_student, "0.mlp.up_proj.weight_quantizer").disable()

    with pytest.raises(ModelError, match=r"up_proj\.input_quantizer must be off in int8_weight_only, got a quantizer"):
        check_quantizers(new_student.model, replace(INT8, format="int8_weight_only"))


def test_stored_amax_of_a_dynamic_quantizer_is_refused(calibrated: Callable[..., Calibrated]) -> None:
    """ModelOpt would use it instead of each token's own."""
    dynamic = copied(calibrated(format="int8_dynamic").student)
    quantizer(dynamic, "1.mlp.up_proj.input_quantizer").amax = torch.tensor(1.0)

    with pytest.raises(ModelError, match=r"up_proj\.input_quantizer must take its scale from each token, got a stored"):
        check_quantizers(dynamic.model, replace(INT8, format="int8_dynamic"))


def test_linears_that_are_kept_have_no_quantizers(new_student: AsrModel) -> None:
    kept = ("layers.0.mlp.down_proj", "layers.2.self_attn.o_proj")

    keep_in_high_precision(new_student.decoder.layers, kept, exact={})

    assert check_quantizers(new_student.model, replace(INT8, kept=kept)) == 38
    assert not any(f".{name}." in found for found, _ in enabled_quantizers(new_student.model) for name in kept)
    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers .*0 Linears kept\), got 38"):
        check_quantizers(new_student.model, INT8)


def test_quantizer_of_a_linear_that_should_be_kept_is_refused_by_name(new_student: AsrModel) -> None:
    """Also when the count is right."""
    keep_in_high_precision(new_student.decoder.layers, ["layers.0.mlp.down_proj"], exact={})

    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.\w+ must be kept in high precision, got a"):
        check_quantizers(new_student.model, replace(INT8, kept=("layers.1.mlp.down_proj",)))


def test_kept_linears_get_their_weights_back_where_calibration_rounded_them(
    calibrated: Callable[..., Calibrated],
) -> None:
    made, names = calibrated(format="w4a8"), ["layers.0.mlp.down_proj", "layers.2.self_attn.o_proj"]
    model = copied(made.student)

    keep_in_high_precision(model.decoder.layers, names, exact=made.calibration.exact)

    for name, weight in made.calibration.exact.items():
        found, rounded = (m.decoder.get_submodule(name).weight for m in (model, made.student))
        assert torch.equal(found, weight if name in names else rounded), name
        assert not torch.equal(weight, rounded), name


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], []),
        (["layers.1.mlp.down_proj"], ["layers.1.mlp.down_proj"]),
        (["layers.*.mlp.down_proj"], [f"layers.{number}.mlp.down_proj" for number in range(12)]),
        (["layers.1"], [f"layers.1.{name}" for name in LINEARS]),
        (["layers.1.mlp.*"], [f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]),
        (["layers.3.self_attn.o_proj", "layers.2.self_attn.o_proj"], [f"layers.{n}.self_attn.o_proj" for n in (2, 3)]),
        (["layers.2.mlp", "layers.2.mlp.up_proj"], [f"layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")]),
        (["layers.*"], [f"layers.{number}.{name}" for number in range(12) for name in LINEARS]),
    ],
)
def test_patterns_name_linears_in_their_order(patterns: list[str], expected: list[str]) -> None:
    """Layer 1 is not layer 10 or 11."""
    assert linears_matching(patterns, num_layers=12) == expected


@pytest.mark.parametrize("pattern", ["layers.12", "layers.0.mlp.lm_head", "lm_head", "mlp.down_proj", ""])
def test_pattern_that_names_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"keep_high_precision must name layers .*, got {pattern!r}; .* layers\.11"):
        linears_matching(["layers.1", pattern], num_layers=12)


@pytest.mark.parametrize(
    ("patterns", "got"),
    [
        (["layers.1.self_attn.v_proj"], r"layers\.1\.self_attn\.v_proj"),
        (["layers.*.self_attn.[qk]_proj"], r"layers\.0\.self_attn\.k_proj, layers\.0\.self_attn\.q_proj"),
        (["layers.2", "layers.3.mlp.up_proj"], r"layers\.3\.mlp\.up_proj"),
    ],
)
def test_part_of_linears_that_servers_run_as_one_is_refused(patterns: list[str], got: str) -> None:
    with pytest.raises(ConfigError, match=rf"all or none, since servers run them as one, got {got}; name the others"):
        linears_matching(patterns, num_layers=4)


@pytest.mark.parametrize("kept", [(), ("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj")])
@pytest.mark.parametrize("name", list(FORMATS))
def test_what_stands_beside_the_weights_reads_back(tmp_path: Path, name: FormatName, kept: tuple[str, ...]) -> None:
    quantization = Quantization(format=name, num_layers=28, kept=kept)

    write_json(tmp_path / QUANTIZATION, quantization.as_json())

    assert read_quantization(tmp_path) == quantization
    each = 1 if name.endswith("weight_only") else 2
    assert quantization.num_quantizers == each * (196 - len(kept))


def test_folder_that_does_not_say_how_it_was_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"quantization\.json must say how .*, got no such file; run quantize again"):
        read_quantization(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"format": "int8", "num_layers": 3}',
        '{"format": "int9", "num_layers": 3, "kept": []}',
        '{"format": ["int8"], "num_layers": 3, "kept": []}',
        '{"format": "int8", "num_layers": "three", "kept": []}',
        '{"format": "int8", "num_layers": 3, "kept": null}',
    ],
)
def test_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / QUANTIZATION).write_text(text)

    with pytest.raises(ModelError, match=r"quantization\.json must name format, layers and what is kept, got .*; qu"):
        read_quantization(tmp_path)


def test_missing_quantizer_is_refused(new_student: AsrModel) -> None:
    quantizer(new_student, "1.mlp.up_proj.input_quantizer").disable()

    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers .*, got 41"):
        check_quantizers(new_student.model, INT8)


def test_quantizer_in_the_audio_tower_is_refused_by_name(new_student: AsrModel) -> None:
    """Also when the count is right."""
    quantizer(new_student, "1.mlp.up_proj.input_quantizer").disable()
    new_student.audio_tower.layers[0].self_attn.q_proj.input_quantizer.enable()

    with pytest.raises(ModelError, match=r"only the decoder's Linears may be quantized, got .*audio_tower.*q_proj"):
        check_quantizers(new_student.model, INT8)


def test_quantizer_of_the_head_is_refused_by_name(new_student: AsrModel) -> None:
    quantizer(new_student, "1.mlp.up_proj.input_quantizer").disable()
    new_student.model.thinker.lm_head.input_quantizer.enable()

    with pytest.raises(ModelError, match=r"only the decoder's Linears may be quantized, got .*lm_head"):
        check_quantizers(new_student.model, INT8)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "input"])
def test_amax_that_is_no_positive_number_is_refused(new_student: AsrModel, kind: str, value: float) -> None:
    quantizer(new_student, f"2.mlp.down_proj.{kind}_quantizer")._amax.flatten()[0] = value

    with pytest.raises(ModelError, match=rf"layers\.2\.mlp\.down_proj\.{kind}_quantizer must have a finite, positive"):
        check_quantizers(new_student.model, INT8)


def test_missing_amax_is_refused(new_student: AsrModel) -> None:
    quantizer(new_student, "0.self_attn.o_proj.input_quantizer").reset_amax()

    with pytest.raises(ModelError, match=r"o_proj\.input_quantizer must have a finite, positive amax, got none"):
        check_quantizers(new_student.model, INT8)


def test_smoothing_that_was_not_folded_is_refused(new_student: AsrModel) -> None:
    owner = quantizer(new_student, "0.self_attn.q_proj.input_quantizer")
    owner._enable_pre_quant_scale = True
    owner.register_buffer("_pre_quant_scale", torch.ones(128))

    with pytest.raises(ModelError, match=r"q_proj\.input_quantizer must have its pre_quant_scale folded away"):
        check_quantizers(new_student.model, INT8)


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
    assert check_quantizers(load(tmp_path / "student", quantized=True).model, INT8) == NUM_QUANTIZERS

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
    assert served_bytes(new_student.model) == LINEAR_WEIGHTS + 4 * LINEAR_ROWS + 2 * others == 3_037_920


@pytest.mark.parametrize(
    ("name", "linear_bytes"),
    [
        ("int8_dynamic", LINEAR_WEIGHTS + 4 * LINEAR_ROWS),
        ("fp8", LINEAR_WEIGHTS + 4 * 21),
        ("int4_weight_only", LINEAR_WEIGHTS // 2 + 4 * LINEAR_WEIGHTS // 32),
        ("w3a8", LINEAR_WEIGHTS * 3 // 8 + 4 * LINEAR_WEIGHTS // 32),
    ],
)
def test_size_follows_the_bits_of_the_weights_and_their_scales(
    calibrated: Callable[..., Calibrated], name: FormatName, linear_bytes: int
) -> None:
    others = NORM_WEIGHTS + EMBEDDING_WEIGHTS + TOWER_WEIGHTS
    assert served_bytes(calibrated(format=name).student.model) == linear_bytes + 2 * others


def test_linear_that_is_kept_is_served_in_bfloat16(student: AsrModel, new_student: AsrModel) -> None:
    keep_in_high_precision(new_student.decoder.layers, ["layers.0.mlp.down_proj"], exact={})

    assert served_bytes(new_student.model) - served_bytes(student.model) == 384 * 128 - 4 * 128


def test_model_without_quantizers_has_its_full_size(nano: AsrModel) -> None:
    assert served_bytes(nano.model) == 2 * sum(parameter.numel() for parameter in nano.model.parameters())


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


def moved(student: AsrModel, *, seed: int) -> dict[str, torch.Tensor]:
    """Weights of all layers as training may leave them, in float32."""
    generator = torch.Generator().manual_seed(seed)
    parameters = student.decoder.layers.named_parameters()
    return {name: p + 0.05 * p.std() * torch.randn(p.shape, generator=generator) for name, p in parameters}


@torch.no_grad()
def folded_by_modelopt(student: AsrModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What :func:`fold_weights` makes of a student that has these weights."""
    expected = copied(student)
    for name, parameter in expected.decoder.layers.named_parameters():
        parameter.copy_(weights[name])
    fold_weights(expected.model)
    return dict(expected.decoder.layers.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int8_weight_only", "fp8", "w4a8"])
@torch.no_grad()
def test_weights_in_training_are_folded_into_a_copy_as_modelopt_folds_a_student_that_has_them(
    calibrated: Callable[..., Calibrated], name: FormatName, dtype: torch.dtype
) -> None:
    """Also twice, one Linear being kept, and by quantizers whose own weights are in parts elsewhere."""
    student = copied(calibrated(format=name).student)
    student.model.to(dtype)
    keep_in_high_precision(student.decoder.layers, ["layers.1.mlp.down_proj"], exact={})
    folded = copied(student)
    fold_weights(folded.model)
    weights = [moved(student, seed=seed) for seed in (1, 2)]
    expected = [folded_by_modelopt(student, one) for one in weights]
    use_fast_fake_quant(student.model)
    for parameter in student.decoder.layers.parameters():
        parameter.data = torch.empty(0, dtype=dtype)

    for given, wanted in zip(weights, expected, strict=True):
        fold_from(folded.decoder.layers, student.decoder.layers, given)

        found = dict(folded.decoder.layers.named_parameters())
        assert set(found) == set(wanted) == set(given)
        for key, value in wanted.items():
            assert value.dtype == dtype
            assert torch.equal(found[key], value), key
            assert found[key].requires_grad == value.requires_grad
            is_quantized = any(key.endswith(f"{linear}.weight") for linear in LINEARS) and "1.mlp.down" not in key
            assert torch.equal(value, given[key].to(dtype)) != is_quantized, key


def test_weights_that_come_layer_by_layer_leave_the_other_layers(student: AsrModel, new_student: AsrModel) -> None:
    weights = moved(student, seed=3)
    wanted = folded_by_modelopt(student, weights)
    fold_weights(new_student.model)
    before = {name: value.clone() for name, value in new_student.decoder.layers.named_parameters()}

    first = {name: value for name, value in weights.items() if name.startswith("1.")}
    fold_from(new_student.decoder.layers, student.decoder.layers, first)

    for name, value in new_student.decoder.layers.named_parameters():
        assert torch.equal(value, wanted[name] if name.startswith("1.") else before[name]), name


def test_copy_that_was_folded_anew_computes_what_the_student_in_training_does(
    student: AsrModel, new_student: AsrModel, unseen: Batch
) -> None:
    weights, copy_of_it = moved(student, seed=4), copied(student)
    fold_weights(copy_of_it.model)
    new_student.decoder.layers.load_state_dict(weights, strict=False)

    fold_from(copy_of_it.decoder.layers, new_student.decoder.layers, weights)

    assert torch.equal(logits_of(copy_of_it, unseen), logits_of(new_student, unseen))
    assert not torch.equal(logits_of(copy_of_it, unseen), logits_of(student, unseen))


@pytest.mark.parametrize(
    ("name", "shape", "got"),
    [
        ("layers.0.mlp.up_proj.weight", (384, 128), "none of that name"),
        ("0.mlp.up_proj.weight", (1, 128), r"\(384, 128\)"),
    ],
)
def test_weights_of_another_decoder_are_not_folded(
    student: AsrModel, new_student: AsrModel, name: str, shape: tuple[int, ...], got: str
) -> None:
    """Nor spread over all rows."""
    fold_weights(new_student.model)

    with pytest.raises(ModelError, match=rf"{name} must fit the copy that decodes, got shape .* where it has {got}"):
        fold_from(new_student.decoder.layers, student.decoder.layers, {name: torch.ones(shape)})


def test_recipe_that_forgets_the_audio_tower_is_refused(
    load_nano: Callable[..., AsrModel], batches: list[Batch]
) -> None:
    """ModelOpt's own preset leaves out the LM head but not the tower."""
    model = load_nano()

    mtq.quantize(model.model, mtq.INT8_SMOOTHQUANT_CFG, forward_loop=lambda _: logits_of(model, batches[0]))

    with pytest.raises(ModelError, match=r"must have 42 enabled quantizers"):
        check_quantizers(model.model, INT8)
