"""Folding moves the smoothing into the weights before the quantizers, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor

from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.linears import LINEARS
from qad_dist.quant.fold import MAX_SCALE, MIN_SCALE
from qad_dist.quant.state import enabled_quantizers
from tests.helpers.quantized import logits_of, quantize, relative_error
from tests.helpers.qwen import load, write_random_model

ALPHAS = [0.0, 0.5, 1.0]
# Its square root is a power of 2 as well: neither planting nor smoothing rounds anything, for any of the alphas.
LOUDER = 256
HEAD_DIM, KV_HEADS, QUERY_HEADS_OF_A_GROUP = 32, 2, 2


def linears_of(layer: Any) -> dict[str, Any]:
    return {name: module for name, module in layer.named_modules() if name in LINEARS}


def input_amax(model: AsrModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Per Linear of every layer, the largest magnitude of each input channel over the batches."""
    amax: dict[str, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.decoder.layers):
        for name, linear in linears_of(layer).items():
            key = f"{number}.{name}"

            def look(_: Any, args: tuple[Tensor], key: str = key) -> None:
                found = args[0].abs().flatten(0, -2).amax(0)
                amax[key] = torch.maximum(amax[key], found) if key in amax else found

            hooks.append(linear.register_forward_pre_hook(look))
    for batch in batches:
        logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return amax


@pytest.mark.parametrize("alpha", ALPHAS)
def test_folded_model_without_quantizers_is_the_original(
    load_nano: Callable[..., AsrModel], nano: AsrModel, batches: list[Batch], unseen: Batch, alpha: float
) -> None:
    student = quantize(load_nano(), *batches, alpha=alpha)

    mtq.disable_quantizer(student.model, "*")

    # Logits reach 10; a product and a quotient of two float32 numbers in each of 3 layers.
    torch.testing.assert_close(logits_of(student, unseen), logits_of(nano, unseen), rtol=0, atol=3e-5)
    assert relative_error(logits_of(student, unseen), logits_of(nano, unseen)) < 1e-5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_multiply_is_left_at_run_time(
    load_nano: Callable[..., AsrModel], batches: list[Batch], alpha: float
) -> None:
    student = quantize(load_nano(), *batches, alpha=alpha)

    for name, quantizer in enabled_quantizers(student.model):
        assert quantizer.pre_quant_scale is None, name
        assert not (name.endswith("input_quantizer") and quantizer._enable_pre_quant_scale), name
    assert not [name for name in student.model.state_dict() if "pre_quant_scale" in name]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scales_are_smoothquants_shared_within_each_group(
    load_nano: Callable[..., AsrModel], nano: AsrModel, batches: list[Batch], alpha: float
) -> None:
    """Read off the weights: what each column was divided by, and what its producer was multiplied with."""
    student, amax = quantize(load_nano(), *batches, alpha=alpha), input_amax(nano, batches)

    for number, (before, after) in enumerate(zip(nano.decoder.layers, student.decoder.layers, strict=True)):
        old, new = linears_of(before), linears_of(after)
        o_share = (KV_HEADS, QUERY_HEADS_OF_A_GROUP, HEAD_DIM)
        groups = {
            ("mlp.down_proj",): None,
            ("self_attn.o_proj",): o_share,
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): None,
            ("mlp.gate_proj", "mlp.up_proj"): None,
        }
        scales = {}
        # What the first two groups fold into; the last two look at these rows as they will be.
        weights = {name: linear.weight for name, linear in old.items()}
        for names, share in groups.items():
            weight_C = torch.stack([weights[name].abs().amax(0) for name in names]).amax(0)
            input_C = torch.stack([amax[f"{number}.{name}"] for name in names]).amax(0)
            if share:
                weight_C, input_C = (
                    part.view(share).amax(1, keepdim=True).expand(share).reshape(-1) for part in (weight_C, input_C)
                )
            scales[names[0]] = (weight_C ** (1 - alpha) / input_C**alpha).clamp(MIN_SCALE, MAX_SCALE)
            if names == ("mlp.down_proj",):
                weights["mlp.up_proj"] = weights["mlp.up_proj"] * scales["mlp.down_proj"][:, None]
            if share:
                per_row = scales["self_attn.o_proj"].view(o_share)[:, 0].reshape(-1)
                weights["self_attn.v_proj"] = weights["self_attn.v_proj"] * per_row[:, None]
            for name in names:
                if name not in ("self_attn.v_proj", "mlp.up_proj"):  # their rows are scaled too, below
                    expected = old[name].weight / scales[names[0]]
                    torch.testing.assert_close(new[name].weight, expected, rtol=1e-5, atol=0, msg=f"{number} {name}")
        q, gate, down, o = (
            scales[name] for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj")
        )
        per_kv_row = o.view(o_share)[:, 0].reshape(-1)
        assert torch.equal(o.view(o_share)[:, 0], o.view(o_share)[:, 1])
        close = torch.testing.assert_close
        close(after.input_layernorm.weight, before.input_layernorm.weight * q, rtol=1e-5, atol=0)
        close(after.post_attention_layernorm.weight, before.post_attention_layernorm.weight * gate, rtol=1e-5, atol=0)
        close(
            new["self_attn.v_proj"].weight,
            old["self_attn.v_proj"].weight * per_kv_row[:, None] / q,
            rtol=1e-5,
            atol=0,
        )
        close(new["mlp.up_proj"].weight, old["mlp.up_proj"].weight * down[:, None] / gate, rtol=1e-5, atol=0)


@torch.no_grad()
def plant_behind_norms(model: AsrModel) -> None:
    """A few channels of every norm far louder, their readers as much quieter: the same function."""
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[[3, 70]] *= LOUDER
            for linear in linears:
                linear.weight[:, [3, 70]] /= LOUDER


@torch.no_grad()
def plant_behind_linears(model: AsrModel) -> None:
    """The same in the inputs of down_proj and o_proj."""
    for layer in model.decoder.layers:
        layer.mlp.up_proj.weight[[5, 300]] *= LOUDER
        layer.mlp.down_proj.weight[:, [5, 300]] /= LOUDER
        layer.self_attn.v_proj.weight[[40]] *= LOUDER  # KV head 1, channel 8: read by query heads 2 and 3
        layer.self_attn.o_proj.weight[:, [2 * HEAD_DIM + 8, 3 * HEAD_DIM + 8]] /= LOUDER


@pytest.mark.parametrize(
    ("alpha", "plants"),
    [
        (0.0, [plant_behind_norms]),
        (0.5, [plant_behind_norms]),
        (1.0, [plant_behind_norms]),
        # Below 1 the weights count, and a loud row of up_proj or v_proj is one of the weights of its own group.
        (1.0, [plant_behind_linears]),
        (1.0, [plant_behind_norms, plant_behind_linears]),
    ],
)
def test_planted_outliers_do_not_change_the_quantized_output(
    load_nano: Callable[..., AsrModel],
    nano: AsrModel,
    batches: list[Batch],
    unseen: Batch,
    alpha: float,
    plants: list[Callable[[AsrModel], None]],
) -> None:
    planted = load_nano()
    for plant in plants:
        plant(planted)
    assert relative_error(logits_of(planted, unseen), logits_of(nano, unseen)) < 1e-6
    plain = quantize(load_nano(), *batches, alpha=alpha)

    quantize(planted, *batches, alpha=alpha)

    assert relative_error(logits_of(planted, unseen), logits_of(plain, unseen)) < 1e-5


@pytest.mark.parametrize("plant", [plant_behind_norms, plant_behind_linears])
def test_planted_outliers_do_harm_without_smoothing(
    load_nano: Callable[..., AsrModel],
    nano: AsrModel,
    student: AsrModel,
    batches: list[Batch],
    plant: Callable[[AsrModel], None],
) -> None:
    """What the test above would miss if the outliers were too small to matter."""
    planted = load_nano()
    plant(planted)
    config = {
        **mtq.INT8_DEFAULT_CFG,
        "quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], {"quantizer_name": "*audio_tower*", "enable": False}],
    }

    mtq.quantize(planted.model, config, forward_loop=lambda _: [logits_of(planted, batch) for batch in batches])

    expected = logits_of(nano, batches[0])
    harm, smoothed = (float((logits_of(m, batches[0]) - expected).norm()) for m in (planted, student))
    assert harm > 5 * smoothed


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 4), (6, 2)])
def test_fold_is_exact_for_other_groupings_of_heads(
    tmp_path: Any, batches: list[Batch], heads: int, kv_heads: int
) -> None:
    folder = write_random_model(
        tmp_path / "tiny", num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    original, student = load(folder), load(folder)

    quantize(student, *batches, alpha=0.5)
    mtq.disable_quantizer(student.model, "*")

    assert relative_error(logits_of(student, batches[0]), logits_of(original, batches[0])) < 1e-5


def test_channel_that_is_always_silent_is_left_alone(
    load_nano: Callable[..., AsrModel], nano: AsrModel, batches: list[Batch], unseen: Batch
) -> None:
    """Its amax is 0, by which alpha 1 would divide."""
    model, silent = load_nano(), load_nano()
    with torch.no_grad():
        for silenced in (model, silent):
            silenced.decoder.layers[1].input_layernorm.weight[9] = 0

    student = quantize(model, *batches)

    before, after = nano.decoder.layers[1], student.decoder.layers[1]
    assert float(after.input_layernorm.weight[9]) == 0
    torch.testing.assert_close(after.self_attn.q_proj.weight[:, 9], before.self_attn.q_proj.weight[:, 9])
    mtq.disable_quantizer(student.model, "*")
    assert relative_error(logits_of(student, unseen), logits_of(silent, unseen)) < 1e-5
