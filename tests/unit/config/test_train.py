"""The train section: presets fill in what is not given, and settings that contradict each other are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from qad_dist.config import RunConfig
from qad_dist.config.train import TrainConfig

RUN = {"run": "unused", "model": {"path": "unused"}, "pack": {"inputs": ["unused"]}}


def loss_of(**settings: Any) -> tuple[float, float, float, float]:
    """Weights of KL and cross-entropy, the temperature, and the weight of the hidden states."""
    config = TrainConfig.model_validate(settings)
    return config.kl_weight, config.ce_weight, config.temperature, config.hidden_weight


def test_loss_is_the_kl_alone_unless_told_otherwise() -> None:
    assert loss_of() == loss_of(preset="qad") == (1.0, 0.0, 1.0, 0.0)
    assert loss_of(hidden_weight=0.5) == (1.0, 0.0, 1.0, 0.5)
    assert not RunConfig.model_validate(RUN).train.compares_layers


def test_released_preset_is_the_loss_of_the_released_model() -> None:
    """Half KL at temperature 2, half cross-entropy: the model card of the INT8 + QAD checkpoint."""
    assert loss_of(preset="released") == (0.5, 0.5, 2.0, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 1.0}, (0.5, 0.5, 1.0, 0.0)),
        ({"ce_weight": 0}, (0.5, 0.0, 2.0, 0.0)),
        ({"kl_weight": 1.0, "ce_weight": 0.1, "temperature": 4, "hidden_weight": 2}, (1.0, 0.1, 4.0, 2.0)),
    ],
    ids=str,
)
def test_values_that_are_given_stand_against_the_preset(given: dict[str, float], expected: tuple[float, ...]) -> None:
    assert loss_of(preset="released", **given) == expected
    assert loss_of(**given, preset="released") == expected


def test_preset_changes_nothing_but_the_loss() -> None:
    released, ours = (TrainConfig.model_validate({"preset": name}).model_dump() for name in ("released", "qad"))

    changed = {name for name in ours if ours[name] != released[name]}

    assert changed == {"preset", "kl_weight", "ce_weight", "temperature"}


def test_section_with_a_preset_survives_being_written_and_read() -> None:
    config = TrainConfig.model_validate({"preset": "released", "ce_weight": 0.25})

    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"preset": "best"}, r"preset.*'qad' or 'released'"),
        ({"preset": ["qad"]}, r"preset.*'qad' or 'released'"),
        ({"divergence": "jensen"}, r"divergence.*'forward' or 'reverse'"),
        ({"teacher": "stored"}, r"teacher.*'online' or 'cached'"),
        ({"max_skipped_steps": -1}, "max_skipped_steps"),
        ({"patience": 0}, "patience"),
        ({"keep": "last", "patience": 3}, r"train\.patience must be null with train\.keep last, got 3;"),
        ({"keep_checkpoints": 1}, "keep_checkpoints"),
        ({"decode_utterances": -1}, "decode_utterances"),
        ({"steps": 50, "warmup_steps": 50}, r"train\.warmup_steps must be below train\.steps \(50\), got 50;"),
        ({"kl_weight": 0}, r"train\.kl_weight and train\.ce_weight must not both be 0"),
        (
            {"evaluate_every": 20, "decode_every": 50},
            r"train\.decode_every must be a multiple of train\.evaluate_every \(20\), got 50;",
        ),
        (
            {"teacher": "cached", "teacher_model": "other"},
            r"train\.teacher cached needs train\.teacher_model null, got 'other'; label stored",
        ),
        (
            {"teacher": "cached", "augment": {"copies": 2}},
            r"train\.teacher cached needs train\.augment\.copies 0, got 2; no states",
        ),
        ({"micro_batch_size": 8}, "micro_batch_size"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){told}"):
        TrainConfig.model_validate(settings)


def test_warmup_is_checked_against_the_steps_that_are_given() -> None:
    assert TrainConfig.model_validate({"steps": 51}).warmup_steps == 50


def test_words_may_be_counted_at_every_look_at_some_or_never() -> None:
    for values in ({"decode_every": 20}, {"decode_every": 60}, {"decode_every": None}, {"decode_utterances": 0}):
        TrainConfig.model_validate({"evaluate_every": 20, **values})


@pytest.mark.parametrize("hidden_states", [True, False])
def test_cached_teacher_needs_that_its_states_are_stored(hidden_states: bool) -> None:
    settings = {**RUN, "train": {"teacher": "cached"}, "label": {"hidden_states": hidden_states}}

    if hidden_states:
        assert RunConfig.model_validate(settings).train.teacher == "cached"
    else:
        with pytest.raises(ValidationError, match=r"train\.teacher cached needs label\.hidden_states true, got false;"):
            RunConfig.model_validate(settings)
