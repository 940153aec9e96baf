"""Loading: what is refused, by which name, and what a fingerprint notices."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from qad_dist.asr.attention import SEGMENT_ATTENTION
from qad_dist.asr.load import (
    AsrModel,
    count_decoder_linears,
    load_teacher,
    resolve_model_folder,
)
from qad_dist.config.model import ModelConfig
from shards.errors import ModelError
from tests.helpers.qwen import load, write_random_model

CPU = torch.device("cpu")


@pytest.fixture
def copied(nano_folder: Path, tmp_path: Path) -> Path:
    """A copy of the embedded teacher to damage."""
    return Path(shutil.copytree(nano_folder, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[Any], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def text_config(**values: Any) -> Callable[[Any], None]:
    return lambda config: config["thinker_config"]["text_config"].update(values)


def test_model_is_frozen_and_attends_by_segments(nano: AsrModel) -> None:
    assert not nano.model.training
    assert not any(parameter.requires_grad for parameter in nano.model.parameters())
    assert {parameter.dtype for parameter in nano.model.parameters()} == {torch.float32}
    assert nano.audio_tower.config._attn_implementation == SEGMENT_ATTENTION
    assert nano.decoder.config._attn_implementation == SEGMENT_ATTENTION
    assert nano.head_weight_VD is nano.decoder.embed_tokens.weight
    assert (len(nano.decoder.layers), count_decoder_linears(nano.decoder)) == (3, 21)


def test_weights_are_those_of_the_file(nano: AsrModel) -> None:
    stored = load_file(nano.folder / "model.safetensors")

    loaded = dict(nano.model.named_parameters())

    assert set(stored) - {"thinker.lm_head.weight"} == set(loaded) - {"thinker.lm_head.weight"}
    for name, weight in stored.items():
        owner = "thinker.model.embed_tokens.weight" if name == "thinker.lm_head.weight" else name
        assert torch.equal(loaded[owner], weight.float()), name


def test_dtype_is_the_one_asked_for(nano_folder: Path) -> None:
    config = ModelConfig(path=str(nano_folder), dtype="bfloat16", audio_attention="full")

    teacher, exact = load_teacher(config, CPU), load_teacher(config, CPU, dtype="float32")

    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in exact.model.parameters()} == {torch.float32}
    assert teacher.audio_attention == "full"


@pytest.mark.parametrize("layers", [1, 2])
def test_other_sizes_of_the_family_load(tmp_path: Path, layers: int) -> None:
    folder = write_random_model(
        tmp_path / "tiny", num_hidden_layers=layers, hidden_size=64, num_attention_heads=2, num_key_value_heads=1
    )

    model = load(folder)

    assert count_decoder_linears(model.decoder) == 7 * layers
    assert model.head_weight_VD.shape == (1024, 64)


def test_head_that_is_stored_twice_is_one_tensor(copied: Path) -> None:
    change_weights(
        copied,
        lambda weights: weights.update(
            {"thinker.lm_head.weight": weights["thinker.model.embed_tokens.weight"].clone()}
        ),
    )

    model = load(copied)

    assert model.head_weight_VD is model.decoder.embed_tokens.weight


@pytest.mark.parametrize("told", [True, False])
def test_head_of_its_own_is_refused(copied: Path, told: bool) -> None:
    """Sharing one tensor for both would replace it without a word, as transformers does where the config says so."""
    edit_config(copied, lambda config: config["thinker_config"]["text_config"].update(tie_word_embeddings=told))
    change_weights(
        copied,
        lambda weights: weights.update({"thinker.lm_head.weight": weights["thinker.model.embed_tokens.weight"] + 1}),
    )

    with pytest.raises(ModelError, match=r"must tie lm_head to the embedding, got a head of its own"):
        load(copied)


@pytest.mark.parametrize("told", [True, False])
def test_head_that_is_not_stored_is_the_embedding(copied: Path, told: bool) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = told
    (copied / "config.json").write_text(json.dumps(config))

    model = load(copied)

    assert model.head_weight_VD is model.decoder.embed_tokens.weight


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path must be a folder with config\.json, got .*nowhere"):
        resolve_model_folder(str(tmp_path / "nowhere"))


def test_folder_without_config_is_refused(copied: Path) -> None:
    (copied / "config.json").unlink()

    with pytest.raises(ModelError, match=r"model\.path must be a folder with config\.json, got .*model"):
        resolve_model_folder(str(copied))


def test_folder_of_a_checkpoint_is_taken_as_it_is(nano_folder: Path) -> None:
    assert resolve_model_folder(str(nano_folder)) == nano_folder


def test_other_model_types_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["model_type"] = "qwen3"
    (copied / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=r"config\.json must name model_type 'qwen3_asr', got 'qwen3'; name another"):
        load(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no such model"}'])
def test_config_that_is_none_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)

    with pytest.raises(ModelError, match=r"model/config\.json must be a Qwen3-ASR's config, got: \w+: .*; copy"):
        load(copied)


@pytest.mark.parametrize("name", ["thinker.model.layers.1.mlp.up_proj.weight", "thinker.model.embed_tokens.weight"])
def test_missing_weight_is_refused_by_name(copied: Path, name: str) -> None:
    change_weights(copied, lambda weights: weights.pop(name) is None)

    with pytest.raises(ModelError, match=rf"must hold every weight of its config, got 1 missing, first {name}"):
        load(copied)


def test_weights_of_a_deeper_model_are_refused(copied: Path) -> None:
    """With one layer less in the config the rest of the checkpoint would load, and be another teacher."""
    edit_config(copied, text_config(num_hidden_layers=2))

    with pytest.raises(ModelError, match=r"no weight that its config has no place for, got 11, first thinker\.model\."):
        load(copied)


@pytest.mark.parametrize(
    ("name", "is_refused"), [("thinker.audio_tower.extra.weight", True), ("talker.head.weight", False)]
)
def test_unknown_weights_of_the_parts_that_are_used_are_refused(copied: Path, name: str, is_refused: bool) -> None:
    change_weights(copied, lambda weights: weights.update({name: torch.zeros(2)}))

    if is_refused:
        with pytest.raises(ModelError, match=rf"no place for, got 1, first {name}; copy all files of one checkpoint"):
            load(copied)
    else:
        load(copied)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: config.update(thinker_config=5), "config.json must be a Qwen3-ASR's config, got: TypeError"),
        (text_config(rope_scaling=None), "must be a complete Qwen3-ASR checkpoint, got: AttributeError"),
        (text_config(hidden_act="no such function"), "must be a complete Qwen3-ASR checkpoint, got: KeyError"),
        (text_config(hidden_size="128"), "text_config.hidden_size must be a positive whole number, got '128'"),
        (text_config(num_attention_heads=0), "text_config.num_attention_heads must be a positive whole number, got 0"),
    ],
)
def test_config_with_an_odd_value_is_refused(copied: Path, change: Callable[[Any], None], told: str) -> None:
    """Such values lead to TypeError, AttributeError, KeyError and ZeroDivisionError somewhere in transformers."""
    edit_config(copied, change)

    with pytest.raises(ModelError, match=re.escape(told)):
        load(copied)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_processor_file_that_is_a_list_is_refused(copied: Path, name: str) -> None:
    (copied / name).write_text("[]")

    with pytest.raises(ModelError, match=rf"must hold a tokenizer and a preprocessor \(.*{name}.*\), got: "):
        load(copied)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "feature_size must be 128, got 80"),  # Whisper's own number
        ({"feature_size": 128, "hop_length": 200}, "hop_length must be 160, got 200"),
        ({"feature_size": 128, "sampling_rate": 8000}, "sampling_rate must be 16000, got 8000"),
    ],
)
def test_preprocessor_that_does_not_suit_the_tower_is_refused(copied: Path, values: dict[str, int], told: str) -> None:
    (copied / "preprocessor_config.json").write_text(json.dumps(values))

    with pytest.raises(ModelError, match=rf"model/preprocessor_config\.json: {told}; copy the base model's files"):
        load(copied)


def test_failed_download_without_a_reason_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)

    with pytest.raises(ModelError, match=r"model\.path must be .* within reach, got 'org/model' \(OSError\); download"):
        resolve_model_folder("org/model")


def test_weight_of_another_shape_is_refused(copied: Path) -> None:
    name = "thinker.model.layers.0.self_attn.q_proj.weight"
    change_weights(copied, lambda weights: weights.update({name: torch.zeros(64, 128)}))

    with pytest.raises(ModelError, match=r"must (hold every weight|be a complete Qwen3-ASR checkpoint)"):
        load(copied)


def test_truncated_weights_are_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(ModelError, match=r"model\.safetensors must be a safetensors file, got: .*incomplete"):
        load(copied)


def test_missing_weights_file_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()

    with pytest.raises(ModelError, match=r"model\.safetensors must be a safetensors file, got: FileNotFoundError"):
        load(copied)


def test_missing_tokenizer_is_refused(copied: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (copied / name).unlink()

    with pytest.raises(ModelError, match=r"model must hold a tokenizer and a preprocessor \(.*\), got: "):
        load(copied)


def test_quantized_folder_is_refused_as_a_teacher(copied: Path) -> None:
    (copied / "modelopt_state.pth").write_bytes(b"never read")

    with pytest.raises(ModelError, match=r"must have no modelopt_state\.pth here, .*name a full-precision checkpoint"):
        load_teacher(ModelConfig(path=str(copied)), CPU)


def test_full_precision_folder_is_refused_as_a_student(copied: Path) -> None:
    with pytest.raises(ModelError, match=r"must have modelopt_state\.pth here, .*name a quantized checkpoint"):
        load(copied, quantized=True)


def test_decoder_with_another_number_of_linears_is_refused(load_nano: Callable[..., AsrModel]) -> None:
    decoder = load_nano().decoder
    decoder.layers[1].mlp.extra_proj = torch.nn.Linear(4, 4)

    with pytest.raises(ModelError, match=r"7 Linear layers in each of its 3 layers, got 22 in all"):
        count_decoder_linears(decoder)
