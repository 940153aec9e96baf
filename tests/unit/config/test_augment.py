"""The augment section refuses what is no alteration of speech, and says what would be."""

from typing import Any

import pytest

from qad_dist.config.augment import AugmentConfig


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"speeds": [1.0, 0.4]},
            r"train\.augment\.speeds must be in \[0\.5, 2\], got 0\.4; 0\.9, 1\.0 and 1\.1 are usual",
        ),
        ({"speeds": [2.1]}, r"train\.augment\.speeds must be in \[0\.5, 2\], got 2\.1;"),
        ({"noise_snr_db": [30, 10]}, r"augment\.noise_snr_db must be the lower and .* got 30 and 10; swap them"),
        ({"gain_db": [1, -1]}, r"augment\.gain_db must be the lower and .* got 1 and -1; swap them"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        AugmentConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"copies": -1},
        {"copies": 101},
        {"copies": 1.5},
        {"speeds": []},
        {"speeds": [float("nan")]},
        {"noise_share": 1.01},
        {"noise_share": -0.01},
        {"noise_snr_db": [10]},
        {"noise_snr_db": [-61, 0]},
        {"gain_db": [-6, 61]},
        {"gain_db": [-6, 0, 6]},
        {"volume": 1},
    ],
    ids=str,
)
def test_value_outside_its_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    name = next(iter(settings))

    with pytest.raises(ValueError, match=name):
        AugmentConfig.model_validate(settings)


def test_bounds_may_be_equal_and_speeds_at_their_limits() -> None:
    config = AugmentConfig.model_validate({"speeds": [0.5, 2], "noise_snr_db": [20, 20], "gain_db": [0, 0]})

    assert config.speeds == (0.5, 2.0)
    assert config.copies == 0
    assert AugmentConfig.model_validate(config.model_dump(mode="json")) == config
