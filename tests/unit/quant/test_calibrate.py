"""Calibration: what a student's weights and scales are made from, in the dtype of use, and that they survive saving.

Dimension key: S tokens, C input channels, O outputs, R response rows, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from torch import Tensor

from qad_dist.asr.decoder import DecoderStack, embed
from qad_dist.asr.load import AsrModel
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.formats import FORMATS, FormatName
from qad_dist.linears import LINEARS
from qad_dist.quant.calibrate import Calibration, GroupKey
from qad_dist.quant.correct import INNER_PART, correct_weight
from qad_dist.quant.fold import fold_groups
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.search import Choice, Group
from qad_dist.quant.state import (
    Quantization,
    check_quantizers,
    enable_checkpointing,
    enabled_quantizers,
    quantizer_hash,
)
from shards.errors import ConfigError, ModelError
from tests.helpers.quantized import (
    INT8,
    NUM_LAYERS,
    Calibrated,
    calibrate,
    copied,
    logits_of,
    quantize,
    source_of,
)
from tests.helpers.qwen import load


@torch.no_grad()
def inputs_of(model: AsrModel, batches: list[Batch]) -> dict[str, Tensor]:
    """What each decoder Linear reads of the batches, ``[S, C]`` by its name, as the model is."""
    found: dict[str, list[Tensor]] = {}

    def look(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        def hook(_: Any, args: tuple[Tensor]) -> None:
            found.setdefault(name, []).append(args[0].squeeze(0))

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
    return {name: torch.cat(parts) for name, parts in found.items()}


def inputs_without_quantizers(student: AsrModel, batches: list[Batch]) -> dict[str, Tensor]:
    off = copied(student)
    mtq.disable_quantizer(off.model, "*")
    return inputs_of(off, batches)


def amax_of(model: AsrModel) -> dict[str, Tensor]:
    return {name: quantizer._amax.float().clone() for name, quantizer in enabled_quantizers(model.decoder.layers)}


def kl_per_token(student: AsrModel, teacher: AsrModel, batch: Batch) -> float:
    log_student_RV, log_teacher_RV = (logits_of(model, batch).double().log_softmax(-1) for model in (student, teacher))
    return float((log_teacher_RV.exp() * (log_teacher_RV - log_student_RV)).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax_are_the_maxima_over_all_batches(
    calibrated: Callable[..., Calibrated], batches: list[Batch], dtype: torch.dtype
) -> None:
    """Behind folding and behind the cast: per tensor for inputs, per output channel for weights."""
    student = calibrated(alpha=1.0, dtype=dtype).student
    amax = amax_of(student)
    assert {parameter.dtype for parameter in student.model.parameters()} == {dtype}

    inputs = inputs_without_quantizers(student, batches)

    assert len(inputs) == 7 * NUM_LAYERS
    for name, inputs_SC in inputs.items():
        assert torch.equal(amax[f"{name}.input_quantizer"].view(()), inputs_SC.abs().max().float()), name
        weight_OC = student.decoder.layers.get_submodule(name).weight.detach().float()
        assert torch.equal(amax[f"{name}.weight_quantizer"].flatten(), weight_OC.abs().amax(1)), name


@pytest.mark.parametrize(("name", "alpha"), [("int8", "none"), ("int8", 0.5), ("fp8", 1.0)])
def test_clipped_amax_are_the_maxima_times_the_share_that_the_search_keeps(
    calibrated: Callable[..., Calibrated], batches: list[Batch], name: FormatName, alpha: Any
) -> None:
    made = calibrated(format=name, alpha=alpha, clip="mse")
    amax = amax_of(made.student)

    inputs = inputs_without_quantizers(made.student, batches)

    for (number, group), one in made.smoothed.items():
        for linear in made.calibration.groups[number, group].consumers:
            whole = float(inputs[f"{number}.{linear}"].abs().max())
            found = float(amax[f"{number}.{linear}.input_quantizer"])
            assert found == pytest.approx(whole * one.choice.kept_share, rel=1e-6)
    assert {one.choice.alpha for one in made.smoothed.values()} == {None if alpha == "none" else alpha}
    if name == "int8":  # an outlier takes no precision of E4M3 from the rest
        assert len({one.choice.kept_share for one in made.smoothed.values()}) > 1


@pytest.mark.parametrize("alpha", [1.0, "none"])
def test_percentile_is_numpys_over_the_inputs_of_the_search_part(
    nano: AsrModel, batches: list[Batch], alpha: Any
) -> None:
    """Smoothed inputs, as a share of the amax that they reach anywhere."""
    made = calibrate(copied(nano), *batches, alpha=alpha, clip="percentile", clip_percentile=98)
    before, everywhere = inputs_of(nano, batches[-1:]), inputs_of(nano, batches)

    for (number, group), one in made.smoothed.items():
        linear = f"{number}.{next(iter(made.calibration.groups[number, group].consumers))}"
        smooth_SC = (before[linear] / one.choice.scale_C).abs().numpy()
        whole = float((everywhere[linear] / one.choice.scale_C).abs().max())
        assert one.choice.kept_share == pytest.approx(np.percentile(smooth_SC, 98) / whole, rel=1e-5)
        assert one.choice.kept_share < 1


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_has_its_quantizers_and_amax(calibrated: Callable[..., Calibrated], name: FormatName) -> None:
    recipe, student = FORMATS[name], calibrated(format=name).student
    weights_only = recipe.input_scales == "none"

    num_quantizers = check_quantizers(student.model, Quantization(format=name, num_layers=NUM_LAYERS))

    assert num_quantizers == (21 if weights_only else 42)
    for quantizer_name, quantizer in enabled_quantizers(student.decoder.layers):
        linear = student.decoder.layers.get_submodule(quantizer_name.rpartition(".")[0])
        rows, columns = linear.weight.shape
        if quantizer_name.endswith("weight_quantizer"):
            expected = {"tensor": (), "channel": (rows, 1), "group": (rows * columns // 32, 1)}[recipe.weight_scales]
            assert tuple(quantizer._amax.shape) == expected
        elif recipe.input_scales == "token":
            assert not hasattr(quantizer, "_amax")
        else:
            assert tuple(quantizer._amax.shape) == ()


def test_every_batch_counts_and_their_order_does_not(nano: AsrModel, batches: list[Batch], student: AsrModel) -> None:
    """A maximum over ranks or in another order is the same maximum."""
    backwards = quantize(copied(nano), *batches[::-1], alpha=1.0)
    lacking = quantize(copied(nano), *batches[:2], alpha=1.0)

    assert quantizer_hash(backwards.model) == quantizer_hash(student.model)
    assert quantizer_hash(lacking.model) != quantizer_hash(student.model)


def test_bfloat16_student_is_measured_again_behind_the_cast(
    calibrated: Callable[..., Calibrated], student: AsrModel
) -> None:
    """The float32 scales, merely cast, would be other ones."""
    measured = amax_of(calibrated(alpha=1.0, dtype=torch.bfloat16).student)

    cast = {name: amax.bfloat16().float() for name, amax in amax_of(student).items()}

    assert list(measured) == list(cast)
    assert any(not torch.equal(measured[name], cast[name]) for name in cast)
    for name, amax in measured.items():
        torch.testing.assert_close(amax, cast[name], rtol=0.15, atol=0, msg=name)


def test_input_that_was_never_seen_is_refused_by_name(nano: AsrModel, batches: list[Batch]) -> None:
    """A run over the set that forgets the last layer."""
    model = copied(nano)

    @torch.no_grad()
    def run_all() -> None:
        embedded = embed(model, batches[0])
        stack = DecoderStack(model.decoder.layers[:-1])
        stack(embedded.hidden_ND, embedded.cos_1NE, embedded.sin_1NE, embedded.segments)

    source = replace(source_of(model, batches), run_all=run_all)
    calibration = Calibration(model.model, model.decoder.layers, QuantizeConfig(alpha=1.0), source)

    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.q_proj\.input_quantizer must see calibration data"):
        calibration.run(torch.float32)


def test_group_size_that_divides_no_width_is_refused(nano: AsrModel, batches: list[Batch]) -> None:
    model = copied(nano)
    section = QuantizeConfig(format="w4a8", group_size=48)

    with pytest.raises(ConfigError, match=r"group_size must divide the width of every input, got 48 for 128 channels"):
        Calibration(model.model, model.decoder.layers, section, source_of(model, batches))


def told_kl(text: str) -> tuple[float, float]:
    (line,) = [line for line in text.splitlines() if "event=confirmed" in line]
    values = dict(part.split("=") for part in line.split() if part.startswith("kl_"))
    return float(values["kl_plain"]), float(values["kl_usual"])


def student_on_the_rest(nano: AsrModel, batches: list[Batch], alphas: dict[GroupKey, float]) -> AsrModel:
    """Static INT8 of these alphas by hand, calibrated by ModelOpt without the last batch."""
    student, inputs = copied(nano), inputs_of(nano, batches[:-1])
    for number, layer in enumerate(student.decoder.layers):
        groups = fold_groups(layer)
        scales = {}
        for group in groups:
            readers = list(group.consumers)
            weight_C = torch.stack([group.consumers[name].weight.abs().amax(0) for name in readers]).amax(0)
            amax_C = inputs[f"{number}.{readers[0]}"].abs().amax(0)
            alpha = alphas[number, group.name]
            scales[group.name] = group.share(amax_C) ** alpha / group.share(weight_C) ** (1 - alpha)
        for group in groups:
            group.fold(scales[group.name].detach())
    mtq.quantize(student.model, modelopt_config(FORMATS["int8"], group_size=32))
    mtq.calibrate(
        student.model, algorithm="max", forward_loop=lambda _: [logits_of(student, batch) for batch in batches[:-1]]
    )
    return student


def test_search_is_confirmed_by_kl_on_its_part(
    nano: AsrModel, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """As students calibrated on the rest have it. Folded once more or less, they have other integers at ties."""
    with caplog.at_level(logging.INFO):
        made = calibrate(copied(nano), *batches)

    kl_searched, kl_usual = told_kl(caplog.text)
    alphas = {key: one.choice.alpha or 0.0 for key, one in made.smoothed.items()}
    is_searched = set(alphas.values()) != {1.0}
    assert is_searched == (kl_searched <= kl_usual)
    usual = student_on_the_rest(nano, batches, dict.fromkeys(alphas, 1.0))
    assert kl_usual == pytest.approx(kl_per_token(usual, nano, batches[-1]), rel=0.3)
    assert is_searched
    searched = student_on_the_rest(nano, batches, alphas)
    assert kl_searched == pytest.approx(kl_per_token(searched, nano, batches[-1]), rel=0.3)


def test_search_that_is_worse_than_alpha_1_by_kl_is_not_used(
    nano: AsrModel, batches: list[Batch], student: AsrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cuts off nearly all that is read: the student is that of alpha 1."""

    def misled(group: Group, *_: Any, **__: Any) -> Choice:
        return Choice(alpha=0.0, scale_C=torch.ones_like(group.amax_C), kept_share=0.02)

    monkeypatch.setattr("qad_dist.quant.choose.search", misled)

    made = calibrate(copied(nano), *batches)

    assert {(one.choice.alpha, one.choice.kept_share) for one in made.smoothed.values()} == {(1.0, 1.0)}
    for name, weight in student.decoder.named_parameters():
        torch.testing.assert_close(made.student.decoder.get_parameter(name), weight, rtol=1e-5, atol=0)
    for name, amax in amax_of(student).items():
        torch.testing.assert_close(amax_of(made.student)[name], amax, rtol=1e-5, atol=0)


def test_few_bits_are_searched_below_alpha_one_half_and_not_confirmed(calibrated: Callable[..., Calibrated]) -> None:
    made = calibrated(format="w4a8")

    assert {tuple(one.choice.errors) for one in made.smoothed.values()} == {
        tuple(f"alpha={alpha:g} kept=1" for alpha in (0, 0.1, 0.2, 0.3, 0.4, 0.5))
    }


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "mlp.down_proj"])
def test_corrected_weights_are_those_for_what_the_student_reads_behind_all_before_them(
    calibrated: Callable[..., Calibrated], nano: AsrModel, batches: list[Batch], linear: str
) -> None:
    """The teacher's tokens against those of the finished student, both of the batches that are not searched on."""
    made, name = calibrated(format="w4a8"), f"1.{linear}"
    group = "o" if linear.endswith("o_proj") else "down"
    scale_C = made.smoothed[1, group].choice.scale_C
    exact_SC, drifted_SC = (inputs_of(model, batches[:2])[name] for model in (nano, made.student))
    steps_S1 = drifted_SC.abs().amax(1, keepdim=True) / 127
    weights_S = torch.cat(
        [torch.ones(len(b.input_ids_N)).index_fill(0, b.rows_R, 11.0) for b in batches[:2]]
    )  # fmt: skip

    rounded_OC, amax_OB1 = correct_weight(
        made.calibration.exact[f"layers.{name}"],
        exact_SC / scale_C,
        (drifted_SC / steps_S1).round() * steps_S1,
        weights_S,
        FORMATS["w4a8"],
        group_size=32,
    )

    found = made.student.decoder.layers.get_submodule(name)
    step_OB1 = amax_OB1 / 7
    codes, expected = (
        (weight_OC.detach().unflatten(1, (-1, 32)) / step_OB1).round() for weight_OC in (found.weight, rounded_OC)
    )
    is_equal_OB1 = (found.weight_quantizer._amax.view_as(amax_OB1) / amax_OB1 - 1).abs() < 1e-3
    assert float(is_equal_OB1.float().mean()) > 0.99  # where two shares are as good, either is found
    assert float((codes != expected)[is_equal_OB1.expand_as(codes)].float().mean()) < 1e-2


def test_corrected_weights_are_of_the_same_integers_behind_the_cast(calibrated: Callable[..., Calibrated]) -> None:
    """Of ModelOpt's quantizers; they are off the grid, by less than bfloat16 could carry over the edge of a step."""
    whole, half = calibrated(format="w4a8").student, calibrated(format="w4a8", dtype=torch.bfloat16).student

    for number, layer in enumerate(whole.decoder.layers):
        for linear in LINEARS:
            exact, cast = (layers.get_submodule(linear) for layers in (layer, half.decoder.layers[number]))
            codes = [
                (owner.weight_quantizer(owner.weight).detach().float().view(-1, 32) / amax_B1 * 7).round()
                for owner in (exact, cast)
                for amax_B1 in [owner.weight_quantizer._amax.float()]
            ]
            assert torch.equal(codes[0], codes[1]), linear
            off_steps = exact.weight.detach().view(-1, 32) / exact.weight_quantizer._amax * 7 - codes[0]
            assert 0.1 < float(off_steps.abs().mean()) < float(off_steps.abs().max()) <= INNER_PART + 1e-4, linear


@pytest.mark.parametrize("name", ["w4a8", "w3a8"])
def test_correction_is_better_than_rounding_to_nearest(
    nano: AsrModel, batches: list[Batch], unseen: Batch, calibrated: Callable[..., Calibrated], name: FormatName
) -> None:
    plain = copied(nano)
    mtq.quantize(plain.model, modelopt_config(FORMATS[name], group_size=32))
    mtq.calibrate(plain.model, algorithm="max", forward_loop=lambda _: None)

    found = calibrated(format=name, alpha="none").student

    assert kl_per_token(found, nano, unseen) < 0.9 * kl_per_token(plain, nano, unseen)


def test_exact_weights_are_kept_in_the_dtype_of_use(calibrated: Callable[..., Calibrated]) -> None:
    whole, half = calibrated(format="w4a8"), calibrated(format="w4a8", dtype=torch.bfloat16)

    assert list(whole.calibration.exact) == [f"layers.{n}.{linear}" for n in range(NUM_LAYERS) for linear in LINEARS]
    for name, weight in whole.calibration.exact.items():
        assert torch.equal(half.calibration.exact[name], weight.bfloat16()), name
    assert calibrated(alpha=1.0).calibration.exact == {}


def test_calibration_on_a_single_batch_corrects_by_that(nano: AsrModel, batches: list[Batch]) -> None:
    """It is of the search part, beside which there is nothing."""
    student = quantize(copied(nano), batches[0], format="w4a8", alpha=0.0)

    assert check_quantizers(student.model, Quantization(format="w4a8", num_layers=NUM_LAYERS)) == 42
    assert kl_per_token(student, nano, batches[0]) < 0.02


def test_quantization_changes_a_little_and_not_the_frozen_parts(
    student: AsrModel, nano: AsrModel, batches: list[Batch]
) -> None:
    assert 0 < kl_per_token(student, nano, batches[0]) < 0.01  # nats a token
    for name, parameter in nano.model.named_parameters():
        if ".layers." not in name or "audio_tower" in name:
            assert torch.equal(student.model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 1.0},
        {"alpha": 1.0, "dtype": torch.bfloat16},
        {"format": "int8_dynamic"},
        {"format": "int8_weight_only"},
        {"format": "fp8"},
        {"format": "int4_weight_only"},
        {"format": "w4a8", "dtype": torch.bfloat16},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_saved_student_loads_with_the_same_logits_bit_for_bit(
    calibrated: Callable[..., Calibrated], unseen: Batch, tmp_path: Path, settings: dict[str, Any]
) -> None:
    student = calibrated(**settings).student
    dtype = str(settings.get("dtype", torch.float32)).removeprefix("torch.")
    enable_checkpointing()

    save_checkpoint(student.model, tmp_path / "student", base=student.folder, dtype=dtype)
    again = load(tmp_path / "student", dtype=dtype, quantized=True)

    check_quantizers(again.model, replace(INT8, format=settings.get("format", "int8")))
    assert quantizer_hash(again.model) == quantizer_hash(student.model)
    assert torch.equal(logits_of(again, unseen), logits_of(student, unseen))
