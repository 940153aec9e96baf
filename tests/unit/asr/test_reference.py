import json
from pathlib import Path
from typing import Any

import pytest

from qad_dist.asr.checkpoint import load_config
from qad_dist.asr.reference import decoder_linears, empty_model, expected_linears

NANO = Path(__file__).parents[2] / "assets" / "nano-teacher"

# Qwen3-ASR-0.6B and -1.7B: the numbers of their config.json that decide shapes.
SMALL = {
    "text": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072},
    "audio": {"d_model": 896, "encoder_layers": 18, "encoder_attention_heads": 14, "encoder_ffn_dim": 3584},
}
LARGE = {
    "text": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144},
    "audio": {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096},
}


def config_of(folder: Path, shapes: dict[str, dict[str, Any]]) -> Any:
    values = json.loads((NANO / "config.json").read_text())
    thinker = values["thinker_config"]
    thinker["text_config"] |= {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    }
    thinker["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    thinker["text_config"] |= shapes["text"]
    thinker["audio_config"] |= {"downsample_hidden_size": 480, "output_dim": shapes["text"]["hidden_size"]}
    thinker["audio_config"]["num_hidden_layers"] = shapes["audio"]["encoder_layers"]
    thinker["audio_config"] |= shapes["audio"]
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder)


def test_decoder_of_the_small_model_has_the_published_layers(tmp_path: Path) -> None:
    config = config_of(tmp_path, SMALL)

    model = empty_model(config)
    linears = decoder_linears(model)

    assert len(linears) == 196
    assert sum(outputs * inputs for outputs, inputs in linears.values()) == 440_401_920  # 440.4 million
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(782e6, rel=0.001)
    assert linears == expected_linears(config)
    assert linears["thinker.model.layers.27.self_attn.k_proj"] == (1024, 1024)
    assert linears["thinker.model.layers.0.self_attn.o_proj"] == (1024, 2048)


def test_decoder_of_the_large_model_has_seven_linears_a_layer(tmp_path: Path) -> None:
    config = config_of(tmp_path, LARGE)

    linears = decoder_linears(empty_model(config))

    # By hand: 28 x (q, o: 2 x 2048 x 2048; k, v: 2 x 1024 x 2048; gate, up, down: 3 x 6144 x 2048).
    assert len(linears) == 196
    assert sum(outputs * inputs for outputs, inputs in linears.values()) == 28 * 50_331_648
    assert linears == expected_linears(config)
    assert linears["thinker.model.layers.27.mlp.down_proj"] == (2048, 6144)


@pytest.mark.parametrize("layers", [1, 5])
def test_linears_follow_the_depth_and_width_of_the_config(tmp_path: Path, layers: int) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": layers, "intermediate_size": 96}
    config = config_of(tmp_path, {"text": text, "audio": SMALL["audio"]})

    linears = decoder_linears(empty_model(config))

    assert len(linears) == 7 * layers
    assert linears == expected_linears(config)


def test_empty_model_takes_no_memory(tmp_path: Path) -> None:
    model = empty_model(config_of(tmp_path, LARGE))

    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
