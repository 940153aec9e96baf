"""Planning numbers: weights against a real checkpoint and the published model, memory against hand counts."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from qad_dist.config import load_run
from qad_dist.runtime.estimate import disk_of_stages, memory_per_rank, model_size
from shards.errors import ModelError

# The widths of Qwen3-ASR-0.6B, as in its config.json.
QWEN3_ASR = {
    "thinker_config": {
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "head_dim": 128,
            "num_hidden_layers": 28,
            "vocab_size": 151_936,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "audio_config": {
            "d_model": 896,
            "encoder_layers": 18,
            "encoder_ffn_dim": 3584,
            "output_dim": 1024,
            "downsample_hidden_size": 480,
            "num_mel_bins": 128,
        },
    }
}


def test_counted_weights_are_those_of_the_checkpoint(root: Path):
    folder = root / "tests/assets/nano-teacher"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weights = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    size = model_size(json.loads((folder / "config.json").read_text()))

    decoder = sum(count for name, count in weights.items() if name.startswith("thinker.model.layers."))
    assert size.decoder_weights == decoder
    assert size.shared_weights == sum(weights.values()) - decoder


def test_real_model_has_782_million_weights_of_which_440_are_trained():
    size = model_size(QWEN3_ASR)

    assert round((size.decoder_weights + size.shared_weights) / 1e6) == 782
    assert round(size.decoder_weights / 1e6) == 440


@pytest.mark.parametrize(
    ("zero_stage", "student", "gradients"), [(1, 440.5, 440.5), (2, 440.5, 440.5 / 8), (3, 440.5 / 8, 440.5 / 8)]
)
def test_memory_of_a_rank_is_shared_out_as_the_zero_stage_says(root, zero_stage, student, gradients):
    run = load_run(root / "configs/toy.yaml", ["model.dtype=bfloat16"])

    parts = memory_per_rank(run, model_size(QWEN3_ASR), zero_stage=zero_stage, world_size=8)

    assert parts["shared frozen parts"] / 2e6 == pytest.approx(342.0, rel=1e-3)
    assert parts["student's decoder"] / 2e6 == pytest.approx(student, rel=1e-3)
    assert parts["gradients"] / 4e6 == pytest.approx(gradients, rel=1e-3)
    assert parts["master, m and v"] / 12e6 == pytest.approx(440.5 / 8, rel=1e-3)


def test_hidden_states_that_are_compared_take_two_more_tensors_of_each_layer(root):
    """The teacher's, and a gradient, which the loss computes on the way forward."""
    runs = [load_run(root / "configs/toy.yaml", [f"train.hidden_weight={weight}"]) for weight in (0, 1)]

    alone, compared = (memory_per_rank(run, model_size(QWEN3_ASR), zero_stage=1, world_size=8) for run in runs)

    assert compared["activations"] - alone["activations"] == 2048 * 2 * 28 * 1024 * 4  # float32
    assert compared | {"activations": 0.0} == alone | {"activations": 0.0}


def test_disk_is_unknown_where_model_or_hours_are(root):
    run = load_run(root / "configs/toy.yaml")

    assert disk_of_stages(run, None, hours=1.0)["export"] is None
    assert disk_of_stages(run, model_size(QWEN3_ASR), hours=None)["pack"] is None
    # An hour of 16 kHz, 16 bit is 115.2 MB before FLAC.
    assert 40e6 < disk_of_stages(run, None, hours=1.0)["pack"] < 115.2e6


def test_config_of_another_model_is_refused():
    with pytest.raises(ModelError, match=r"^config\.json must describe a Qwen3-ASR, got one without 'thinker_config'"):
        model_size({"model_type": "llama"})
