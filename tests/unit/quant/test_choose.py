"""Candidates for a group's scale and clipping: which there are, and what they are made from."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.formats import FORMATS
from qad_dist.quant.choose import candidates, percentile_share
from qad_dist.quant.search import Group, exact_outputs, output_error, scale_at
from qad_dist.quant.walk import Tokens
from tests.helpers.quantized import calibrate, copied

CHANNELS, TOKENS = 32, 400


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rest() -> Group:
    """Heavy-tailed inputs of uneven channels; the maxima are those of other tokens, a little lower than theirs."""
    inputs_SC = random(TOKENS, CHANNELS, seed=0) ** 3 * random(CHANNELS, seed=1).exp()
    weights = {"a": random(24, CHANNELS, seed=2), "b": random(16, CHANNELS, seed=3)}
    return Group(
        weights_OC=weights,
        amax_C=inputs_SC.abs().amax(0) * 0.8,
        weight_amax_C=torch.cat(list(weights.values())).abs().amax(0),
        tokens=Tokens(inputs_SC, torch.ones(TOKENS)),
    )


@pytest.fixture
def whole(rest: Group) -> Group:
    return replace(rest, amax_C=rest.tokens.inputs_SC.abs().amax(0))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["plain", "percentile", "mse", "usual"]),
        ({"clip": "none"}, ["plain", "usual"]),
        ({"clip": "mse"}, ["mse", "usual"]),
        ({"clip": "percentile"}, ["percentile", "usual"]),
        ({"alpha": 0.5}, ["plain", "percentile", "mse"]),
        ({"alpha": "none", "clip": "mse"}, ["mse"]),
        ({"alpha": 0.5, "clip": "none"}, ["plain"]),
        ({"format": "int8_dynamic"}, ["plain", "usual"]),
        ({"format": "int8_weight_only", "clip": "percentile"}, ["plain", "usual"]),
        ({"format": "w4a8", "group_size": 16}, ["plain"]),
        ({"format": "fp8"}, ["plain", "percentile", "mse", "usual"]),
    ],
    ids=str,
)
def test_settings_say_what_there_is_to_choose_from(
    whole: Group, rest: Group, settings: dict[str, Any], expected: list[str]
) -> None:
    section = QuantizeConfig.model_validate(settings)

    assert list(candidates("qkv", whole, rest, section)) == expected


def test_scale_is_made_from_the_whole_set_and_tried_as_without_the_held_out_part(whole: Group, rest: Group) -> None:
    found = candidates("o", whole, rest, QuantizeConfig(alpha={"o": 0.5}))

    for candidate in found.values():
        assert torch.equal(candidate.choice.scale_C, scale_at(0.5, whole, FORMATS["int8"]))
        assert torch.equal(candidate.trial_C, scale_at(0.5, rest, FORMATS["int8"]))
        unclipped = float((rest.amax_C / candidate.trial_C).amax())
        assert candidate.trial_amax == pytest.approx(unclipped * candidate.choice.kept_share)
    assert found["plain"].choice.kept_share == 1


def test_percentile_is_numpys_on_the_sampled_tokens(whole: Group) -> None:
    scale_C = scale_at(0.5, whole, FORMATS["int8"])

    found = percentile_share(whole, scale_C, 99.0)

    smoothed = whole.tokens.inputs_SC.numpy() / scale_C.numpy()
    assert found == pytest.approx(np.percentile(np.abs(smoothed), 99.0) / np.abs(smoothed).max(), rel=1e-5)
    assert found < 1


def test_percentile_above_all_that_was_calibrated_on_keeps_everything(whole: Group) -> None:
    quiet = replace(whole, amax_C=whole.amax_C / 10)

    assert percentile_share(quiet, torch.ones(CHANNELS), 100.0) == 1.0


def test_clipping_by_error_takes_the_share_of_the_smallest_one(whole: Group, rest: Group) -> None:
    loud = replace(rest, amax_C=rest.amax_C * 3)  # far above what is read: keeping less of it must be better
    recipe = FORMATS["int8"]

    found = candidates("o", whole, loud, QuantizeConfig(alpha=1.0, clip="mse"))["mse"]

    scale_C = scale_at(1.0, loud, recipe)
    errors = {
        share: output_error(loud, exact_outputs(loud), recipe, scale_C=scale_C, kept_share=share, group_size=CHANNELS)
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
    }
    assert found.choice.kept_share == min(errors, key=lambda share: errors[share]) < 1


def test_candidate_of_the_lowest_kl_is_folded_and_its_clipping_is_in_the_scales(
    nano: AsrModel, batches: list[Batch], caplog: pytest.LogCaptureFixture, calibrated: Callable[..., Any]
) -> None:
    with caplog.at_level(logging.INFO):
        made = calibrate(copied(nano), *batches, alpha=1.0, clip="search")

    (line,) = [line for line in caplog.text.splitlines() if "event=confirmed" in line]
    told = dict(part.split("=") for part in line.split() if "=" in part)
    kls = {name.removeprefix("kl_"): float(value) for name, value in told.items() if name.startswith("kl_")}
    assert set(kls) == {"plain", "percentile", "mse"}
    assert told["chosen"] == min(kls, key=lambda name: kls[name])
    plain = calibrated(alpha=1.0)
    for key, one in made.smoothed.items():
        for name, linear in made.calibration.groups[key].consumers.items():
            unclipped = plain.calibration.groups[key].consumers[name].input_quantizer._amax
            # Folded once more: its inputs are others by rounding.
            expected = unclipped * one.choice.kept_share
            torch.testing.assert_close(linear.input_quantizer._amax, expected, rtol=1e-4, atol=0)
