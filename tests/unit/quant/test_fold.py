"""Folding moves the smoothing into the weights before the quantizers, and nothing else changes.

Dimension key: C input channels, K key-value heads, G query heads of each, E head width, N packed tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth
from torch import Tensor

from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.formats import FORMATS
from qad_dist.linears import LINEARS
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import GroupKey
from qad_dist.quant.fold import FoldGroup, fold_groups
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.search import MAX_SCALE, MIN_SCALE
from qad_dist.quant.state import enabled_quantizers
from tests.helpers.quantized import Calibrated, calibrate, copied, logits_of, quantize, relative_error
from tests.helpers.qwen import load, write_random_model

ALPHAS = [0.0, 0.5, 1.0, "search"]
K, G, E = 2, 2, 32
GROUPS = {name: group for group, names in {
    "qkv": LINEARS[:3], "o": LINEARS[3:4], "gate_up": LINEARS[4:6], "down": LINEARS[6:]
}.items() for name in names}  # fmt: skip


def linears_of(layer: Any) -> dict[str, Any]:
    return {name: module for name, module in layer.named_modules() if name in LINEARS}


def groups_of(model: AsrModel) -> dict[GroupKey, FoldGroup]:
    return {(n, group.name): group for n, layer in enumerate(model.decoder.layers) for group in fold_groups(layer)}


def scales_of(made: Calibrated) -> dict[GroupKey, Tensor]:
    return {key: one.choice.scale_C for key, one in made.smoothed.items()}


def largest_of_heads(values_C: Tensor) -> Tensor:
    """For each query head's channels the largest of its key-value head's group, by hand."""
    values_KGE = values_C.view(K, G, E)
    return torch.stack([values_KGE.amax(1)] * G, dim=1).flatten()


def input_amax(model: AsrModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Per Linear of every layer, the largest magnitude of each input channel over the batches."""
    amax: dict[str, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.decoder.layers):
        for name, linear in linears_of(layer).items():

            def look(_: Any, args: tuple[Tensor], key: str = f"{number}.{name}") -> None:
                found = args[0].abs().flatten(0, -2).amax(0)
                amax[key] = torch.maximum(amax[key], found) if key in amax else found

            hooks.append(linear.register_forward_pre_hook(look))
    for batch in batches:
        logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return amax


def smooth_by_modelopt(model: AsrModel, scales: Mapping[GroupKey, Tensor], batches: list[Batch]) -> AsrModel:
    """A static INT8 student that divides its inputs by these scales at run time; all but the scales is ModelOpt's."""
    mtq.quantize(model.model, modelopt_config(FORMATS["int8"], group_size=128))
    for key, group in groups_of(model).items():
        for linear in group.consumers.values():
            apply_pre_quant_scale_and_smooth(linear, 1 / scales[key])
    mtq.calibrate(model.model, algorithm="max", forward_loop=lambda _: [logits_of(model, batch) for batch in batches])
    return model


@pytest.mark.parametrize("alpha", ALPHAS)
def test_student_with_all_quantizers_off_is_the_teacher(
    calibrated: Callable[..., Calibrated], nano: AsrModel, unseen: Batch, alpha: float | str
) -> None:
    student = copied(calibrated(alpha=alpha).student)
    assert relative_error(logits_of(student, unseen), logits_of(nano, unseen)) > 1e-4

    mtq.disable_quantizer(student.model, "*")

    # Of float32: a product and a quotient of two numbers in each of 3 layers; of a refused search a second pair.
    assert relative_error(logits_of(student, unseen), logits_of(nano, unseen)) < 1e-5


def test_weights_before_rounding_are_the_folded_teachers(
    calibrated: Callable[..., Calibrated], nano: AsrModel, unseen: Batch
) -> None:
    """Where calibration rounds the weights themselves: put back, with all quantizers off, they make the teacher."""
    made = calibrated(format="w4a8")
    restored = copied(nano)
    for key, group in groups_of(restored).items():
        group.fold(made.smoothed[key].choice.scale_C)

    folded = dict(restored.decoder.named_parameters())
    assert len(made.calibration.exact) == 21
    for linear, weight in made.calibration.exact.items():
        assert torch.equal(weight, folded[f"{linear}.weight"]), linear
    assert relative_error(logits_of(restored, unseen), logits_of(nano, unseen)) < 1e-5


@torch.no_grad()
def codes_of(module: Any, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The integers that the quantizers in a module make while something runs."""
    codes: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(quantizer: Any, _: Any, outputs: Tensor) -> None:
            codes[name] = (outputs * 127 / quantizer._amax).round()

        return hook

    hooks = [quantizer.register_forward_hook(look(name)) for name, quantizer in enabled_quantizers(module)]
    run()
    for hook in hooks:
        hook.remove()
    return codes


def test_folded_student_computes_what_modelopts_unfolded_one_does_to_the_last_bit_for_powers_of_two(
    calibrated: Callable[..., Calibrated], nano: AsrModel, batches: list[Batch], unseen: Batch
) -> None:
    """No product is rounded then, so that not one of 1.7 million integers may differ."""
    scales = {key: scale_C.log2().round().exp2() for key, scale_C in scales_of(calibrated()).items()}
    folded = copied(nano)
    for key, group in groups_of(folded).items():
        group.fold(scales[key])
    mtq.quantize(folded.model, modelopt_config(FORMATS["int8"], group_size=128))
    mtq.calibrate(folded.model, algorithm="max", forward_loop=lambda _: [logits_of(folded, b) for b in batches])

    unfolded = smooth_by_modelopt(copied(nano), scales, batches)

    ours, theirs = (codes_of(model.decoder, lambda m=model: logits_of(m, unseen)) for model in (folded, unfolded))
    assert len(ours) == 42
    assert [name for name, codes in ours.items() if not torch.equal(codes, theirs[name])] == []
    assert torch.equal(logits_of(folded, unseen), logits_of(unfolded, unseen))


@pytest.mark.parametrize("alpha", [1.0, "search"])
def test_calibrated_student_has_the_integers_of_modelopts_unfolded_one_but_for_ties(
    calibrated: Callable[..., Calibrated],
    nano: AsrModel,
    batches: list[Batch],
    unseen: Batch,
    alpha: float | str,
) -> None:
    """Layer by layer on the teacher's hidden states: a product that is rounded otherwise moves a value that is all but
    halfway between two integers to the other one, and the layers behind it would multiply that. Of 574,464 integers of
    a layer up to 11 were seen to differ for 1, and 747 for a search, which folds three times: one that differs in what
    attention reads moves others behind it, by two steps now and then.
    """
    made = calibrated(alpha=alpha)
    unfolded = smooth_by_modelopt(copied(nano), scales_of(made), batches)
    walking = walk_batch(nano, unseen, number=0, is_search=True)
    hidden_ND = walking.start_ND

    for layers in zip(made.student.decoder.layers, unfolded.decoder.layers, nano.decoder.layers, strict=True):
        ours, theirs = (codes_of(layer, lambda x=layer, h=hidden_ND: walking.run_layer(x, h)) for layer in layers[:2])
        differences = torch.cat([(codes - theirs[name]).flatten() for name, codes in ours.items()])
        assert len(ours) == 14
        assert float(differences.abs().max()) <= 2
        assert float((differences.abs() > 1).float().mean()) < 1e-4
        assert float((differences != 0).float().mean()) < 5e-3
        hidden_ND = walking.run_layer(layers[2], hidden_ND)


def test_scales_at_alpha_1_are_those_of_modelopts_own_smoothquant(
    calibrated: Callable[..., Calibrated], nano: AsrModel, batches: list[Batch]
) -> None:
    """But for o_proj, where those of query heads that read one key-value head are made equal, to the largest."""
    made, reference = calibrated(alpha=1.0), copied(nano)
    off = {"quantizer_name": "*audio_tower*", "enable": False}
    config = {**mtq.INT8_SMOOTHQUANT_CFG, "quant_cfg": [*mtq.INT8_SMOOTHQUANT_CFG["quant_cfg"], off]}

    mtq.quantize(reference.model, config, forward_loop=lambda _: [logits_of(reference, batch) for batch in batches])

    for (number, name), group in groups_of(reference).items():
        scale_C = made.smoothed[number, name].choice.scale_C
        for linear in group.consumers.values():
            expected_C = 1 / linear.input_quantizer.pre_quant_scale
            if name == "o":
                expected_C = largest_of_heads(expected_C)
            torch.testing.assert_close(scale_C, expected_C, rtol=1e-6, atol=0, msg=f"{number} {name}")


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_multiply_is_left_at_run_time(calibrated: Callable[..., Calibrated], alpha: float | str) -> None:
    model = calibrated(alpha=alpha).student.model

    for name, quantizer in enabled_quantizers(model):
        assert quantizer.pre_quant_scale is None, name
    assert not [name for name in model.state_dict() if "pre_quant_scale" in name]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scales_are_smoothquants_shared_within_each_group(
    calibrated: Callable[..., Calibrated], nano: AsrModel, batches: list[Batch], alpha: float
) -> None:
    """Read off the weights: what each column was multiplied by, and what its producer was divided by."""
    student, amax = calibrated(alpha=alpha).student, input_amax(nano, batches)

    for number, (before, after) in enumerate(zip(nano.decoder.layers, student.decoder.layers, strict=True)):
        old, new = linears_of(before), linears_of(after)
        scales: dict[str, Tensor] = {}
        for group in set(GROUPS.values()):
            names = [name for name, owner in GROUPS.items() if owner == group]
            weight_C = torch.stack([old[name].weight.abs().amax(0) for name in names]).amax(0)
            input_C = amax[f"{number}.{names[0]}"]
            if group == "o":
                weight_C, input_C = largest_of_heads(weight_C), largest_of_heads(input_C)
            scales[group] = (input_C**alpha / weight_C ** (1 - alpha)).clamp(MIN_SCALE, MAX_SCALE)
        rows = {"self_attn.v_proj": scales["o"].view(K, G, E)[:, 1].flatten(), "mlp.up_proj": scales["down"]}

        for name, linear in old.items():
            expected_OC = linear.weight * scales[GROUPS[name]] / rows.get(name, torch.ones(1))[:, None]
            torch.testing.assert_close(new[name].weight, expected_OC, rtol=1e-5, atol=0, msg=f"{number} {name}")
        for norm, group in (("input_layernorm", "qkv"), ("post_attention_layernorm", "gate_up")):
            expected_C = getattr(before, norm).weight / scales[group]
            torch.testing.assert_close(getattr(after, norm).weight, expected_C, rtol=1e-5, atol=0)


@torch.no_grad()
def plant_behind_norms(model: AsrModel, factor: float) -> None:
    """One channel of every norm far louder, of 128, its readers as much quieter: the same function."""
    for number, layer in enumerate(model.decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for channel, norm, linears in (
            (3 + number, layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (70 + number, layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channel] *= factor
            for linear in linears:
                linear.weight[:, channel] /= factor


@torch.no_grad()
def plant_behind_linears(model: AsrModel, factor: float) -> None:
    """The same in the inputs of down_proj and o_proj."""
    for layer in model.decoder.layers:
        layer.mlp.up_proj.weight[[5, 300]] *= factor
        layer.mlp.down_proj.weight[:, [5, 300]] /= factor
        layer.self_attn.v_proj.weight[[40]] *= factor  # KV head 1, channel 8: read by query heads 2 and 3
        layer.self_attn.o_proj.weight[:, [2 * E + 8, 3 * E + 8]] /= factor


def planted(nano: AsrModel, *plants: Callable[[AsrModel, float], None], factor: float) -> AsrModel:
    model = copied(nano)
    for plant in plants:
        plant(model, factor)
    return model


def kl_per_token(student: AsrModel, teacher: AsrModel, batch: Batch) -> float:
    log_student_RV, log_teacher_RV = (logits_of(model, batch).double().log_softmax(-1) for model in (student, teacher))
    return float((log_teacher_RV.exp() * (log_teacher_RV - log_student_RV)).sum(-1).mean())


@pytest.mark.parametrize(
    ("alpha", "factor", "plants"),
    [
        (0.0, 128, [plant_behind_norms]),
        (0.5, 256, [plant_behind_norms]),
        # Below 1 the weights count, and a loud row of up_proj or v_proj is one of the weights of its own group.
        (1.0, 128, [plant_behind_norms, plant_behind_linears]),
    ],
)
def test_planted_outliers_do_not_change_the_quantized_output(
    calibrated: Callable[..., Calibrated],
    nano: AsrModel,
    batches: list[Batch],
    unseen: Batch,
    alpha: float,
    factor: float,
    plants: list[Callable[[AsrModel, float], None]],
) -> None:
    """The factor and its root are powers of two: neither planting nor smoothing rounds anything."""
    model = planted(nano, *plants, factor=factor)
    assert relative_error(logits_of(model, unseen), logits_of(nano, unseen)) < 1e-6
    plain = calibrated(alpha=alpha).student

    quantize(model, *batches, alpha=alpha)

    assert relative_error(logits_of(model, unseen), logits_of(plain, unseen)) < 1e-6
    assert kl_per_token(model, nano, unseen) == pytest.approx(kl_per_token(plain, nano, unseen), rel=1e-6)


def test_search_chooses_around_planted_outliers_what_it_chooses_without(
    calibrated: Callable[..., Calibrated],
    nano: AsrModel,
    batches: list[Batch],
    unseen: Batch,
) -> None:
    """Scales 128-fold of the planted channels, all else the same to 1e-6, and so a student as good.

    128 to the power of 0.95 is rounded, and what that moves over a tie is all that differs.
    """
    plain = calibrated()

    found = calibrate(planted(nano, plant_behind_norms, factor=128), *batches)

    for (number, name), one in found.smoothed.items():
        factor_C = torch.ones_like(one.choice.scale_C)
        if name in ("qkv", "gate_up"):
            factor_C[(3 if name == "qkv" else 70) + number] = 128
        other = plain.smoothed[number, name].choice
        assert one.choice.alpha == other.alpha
        torch.testing.assert_close(one.choice.scale_C, other.scale_C * factor_C, rtol=1e-6, atol=0)
    kl, kl_planted = (kl_per_token(model.student, nano, unseen) for model in (plain, found))
    assert kl_planted == pytest.approx(kl, rel=0.3)  # 14 % of 0.00027 nats were seen


@pytest.mark.parametrize("plant", [plant_behind_norms, plant_behind_linears])
def test_planted_outliers_do_harm_without_smoothing(
    calibrated: Callable[..., Calibrated],
    nano: AsrModel,
    batches: list[Batch],
    unseen: Batch,
    plant: Callable[[AsrModel, float], None],
) -> None:
    """What the tests above would miss if the outliers were too small to matter."""
    harmed = quantize(planted(nano, plant, factor=128), *batches, alpha="none")

    plain = calibrated(alpha="none").student
    assert kl_per_token(harmed, nano, unseen) > 10 * kl_per_token(plain, nano, unseen)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2)])
def test_fold_is_exact_for_other_groupings_of_heads(
    tmp_path: Path, batches: list[Batch], heads: int, kv_heads: int
) -> None:
    folder = write_random_model(
        tmp_path / "tiny", num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    original, student = load(folder), load(folder)

    quantize(student, *batches, alpha=0.5)
    mtq.disable_quantizer(student.model, "*")

    assert relative_error(logits_of(student, batches[0]), logits_of(original, batches[0])) < 1e-5


def test_bias_of_a_producer_is_divided_as_its_rows_are() -> None:
    """v_proj has one where the config says attention_bias."""
    producer, reader = torch.nn.Linear(6, 4), torch.nn.Linear(8, 3, bias=False)
    group = FoldGroup(name="o", consumers={"o": reader}, producer=producer, num_kv_heads=2)
    inputs_NC, scale_C = (
        torch.randn(5, 6),
        torch.tensor([2.0, 3, 2, 3, 0.5, 7, 0.5, 7]),
    )  # 2 query heads of width 2 each

    def run() -> Tensor:
        return reader(producer(inputs_NC).view(5, 2, 1, 2).expand(5, 2, 2, 2).reshape(5, 8)).detach()

    before_NO = run()
    group.fold(scale_C)

    torch.testing.assert_close(run(), before_NO, rtol=1e-5, atol=1e-6)


def test_channel_that_is_always_silent_is_left_alone(nano: AsrModel, batches: list[Batch], unseen: Batch) -> None:
    """Its amax is 0, by which alpha 1 would divide."""
    model, silent = copied(nano), copied(nano)
    with torch.no_grad():
        for silenced in (model, silent):
            silenced.decoder.layers[1].input_layernorm.weight[9] = 0

    student = quantize(model, *batches, alpha=1.0)

    before, after = nano.decoder.layers[1], student.decoder.layers[1]
    assert float(after.input_layernorm.weight[9]) == 0
    torch.testing.assert_close(after.self_attn.q_proj.weight[:, 9], before.self_attn.q_proj.weight[:, 9])
    mtq.disable_quantizer(student.model, "*")
    assert relative_error(logits_of(student, unseen), logits_of(silent, unseen)) < 1e-5
