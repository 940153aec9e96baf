"""The quantize section refuses what cannot work, and says what would."""

from typing import Any

import pytest

from qad_dist.config.quantize import QuantizeConfig
from qad_dist.formats import FORMATS

SERVED = "int8, int8_dynamic, int8_weight_only, fp8, int4_weight_only, w4a8"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"format": "w3a8"},
            rf"quantize\.format must be one that export can .* \({SERVED}\), got w3a8; set quan",
        ),
        ({"alpha": 1.5}, r"quantize\.alpha must be in \[0, 1\], got 1\.5; 1 and 0\.5 are usual"),
        ({"alpha": -0.1}, r"quantize\.alpha must be in \[0, 1\], got -0\.1"),
        ({"alpha": {"qkv": 0.5, "down": 2}}, r"quantize\.alpha must be in \[0, 1\], got 2;"),
        ({"keep_high_precision": "auto"}, r"auto and quantize\.kl_budget need each other, got auto and None; set both"),
        ({"kl_budget": 0.1}, r"auto and quantize\.kl_budget need each other, got \[\] and 0\.1; set both"),
        (
            {"keep_high_precision": "auto", "kl_budget": 0.1, "sensitivity_utterances": 0},
            r"quantize\.sensitivity_utterances must be at least 1 for keep_high_precision auto, got 0; 64 are enough",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        QuantizeConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "int9"},
        {"alpha": "best"},
        {"alpha": {"q_proj": 0.5}},
        {"alpha": float("nan")},
        {"clip_percentile": 100.1},
        {"clip_percentile": 90},
        {"search_share": 1.0},
        {"search_share": 0.0},
        {"search_rows": 63},
        {"group_size": 4},
        {"kl_budget": 0, "keep_high_precision": "auto"},
        {"compare": ["int9"]},
        {"calibration_utterances": 0},
    ],
    ids=str,
)
def test_value_outside_its_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    name = next(iter(settings))

    with pytest.raises(ValueError, match=name):
        QuantizeConfig.model_validate(settings)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_accepted_for_research(name: str) -> None:
    section = QuantizeConfig.model_validate({"format": name, "research": True})

    assert section.recipe is FORMATS[section.format]


@pytest.mark.parametrize("alpha", [0, 1, 0.5, "search", "none", {"qkv": 0.5}, {"o": 0, "down": 1}])
def test_alphas_of_all_kinds_are_accepted(alpha: Any) -> None:
    assert QuantizeConfig.model_validate({"alpha": alpha}).alpha == alpha


@pytest.mark.parametrize("name", ["int8", "fp8", "w4a8"])
@pytest.mark.parametrize("clip", ["none", "mse", "percentile", "search"])
def test_clipping_may_be_said_of_any_format(name: str, clip: str) -> None:
    """Of those without static scales it says nothing, so that formats can be compared under one setting."""
    assert QuantizeConfig.model_validate({"format": name, "clip": clip}).clip == clip


def test_auto_with_a_budget_and_utterances_is_accepted() -> None:
    section = QuantizeConfig.model_validate({"keep_high_precision": "auto", "kl_budget": 0.01})

    assert (section.keep_high_precision, section.kl_budget) == ("auto", 0.01)
