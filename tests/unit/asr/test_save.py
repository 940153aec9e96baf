"""Saving: the base model's own files, the tied head as the base has it, and a reload that is equal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qad_dist.asr.load import PROCESSOR_FILES, AsrModel
from qad_dist.asr.save import save_checkpoint
from shards.storage import verify_manifest
from tests.helpers.qwen import load, load_reference


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, nano: AsrModel) -> Path:
    """The float32 teacher, saved."""
    folder = tmp_path_factory.mktemp("save") / "student"
    save_checkpoint(nano.model, folder, base=nano.folder, dtype="float32")
    return folder


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_tokenizer_template_and_preprocessor_are_copied_byte_for_byte(saved: Path, nano_folder: Path) -> None:
    expected = {name for name in PROCESSOR_FILES if (nano_folder / name).is_file()}

    assert {path.name for path in saved.iterdir()} == expected | {"config.json", "manifest.json", "model.safetensors"}
    for name in expected:
        assert (saved / name).read_bytes() == (nano_folder / name).read_bytes(), name


def test_config_is_the_base_models_with_another_dtype(saved: Path, nano_folder: Path) -> None:
    """``save_pretrained`` itself renames ``thinker_config.model_type``."""
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (nano_folder, saved))

    assert config["thinker_config"]["model_type"] == base["thinker_config"]["model_type"] == "qwen3_asr_thinker"
    assert config["dtype"] == config["thinker_config"]["dtype"] == "float32"
    base["dtype"] = base["thinker_config"]["dtype"] = "float32"
    assert config == base


def test_config_in_the_older_spelling_keeps_it(nano: AsrModel, nano_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(nano_folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))

    save_checkpoint(nano.model, tmp_path / "student", base=base, dtype="float32")

    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    assert "dtype" not in written


def test_tied_head_is_stored_once(saved: Path) -> None:
    names = stored_names(saved)

    assert "thinker.model.embed_tokens.weight" in names
    assert "thinker.lm_head.weight" not in names


@pytest.fixture
def untied_base(nano_folder: Path, tmp_path: Path) -> Path:
    """The teacher with its head stored beside the embedding, and no config section that says that they are one."""
    base = Path(shutil.copytree(nano_folder, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["thinker.lm_head.weight"] = weights["thinker.model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    for section in (config, config["thinker_config"], config["thinker_config"]["text_config"]):
        section["tie_word_embeddings"] = False
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_head_is_stored_where_the_base_stores_it(untied_base: Path, tmp_path: Path) -> None:
    """Its config comes from the base too, and would have qwen-asr make a random head where there is none."""
    model = load(untied_base)

    save_checkpoint(model.model, tmp_path / "student", base=untied_base, dtype="float32")

    stored = load_file(tmp_path / "student" / "model.safetensors")
    assert torch.equal(stored["thinker.lm_head.weight"], stored["thinker.model.embed_tokens.weight"])
    theirs = load_reference(tmp_path / "student").thinker
    assert torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert model.head_weight_VD is model.decoder.embed_tokens.weight  # saving unties nothing


def test_manifest_covers_every_file(saved: Path) -> None:
    assert set(verify_manifest(saved)) == {path.name for path in saved.iterdir()} - {"manifest.json"}


def test_reload_is_equal_bit_for_bit(saved: Path, nano: AsrModel) -> None:
    again = load(saved)

    expected, found = nano.model.state_dict(), again.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert again.prompt.build(5) == nano.prompt.build(5)


def test_bfloat16_model_is_stored_and_loaded_as_such(load_nano: Callable[..., AsrModel], tmp_path: Path) -> None:
    model = load_nano(dtype="bfloat16")

    save_checkpoint(model.model, tmp_path / "student", base=model.folder, dtype="bfloat16")

    with safe_open(tmp_path / "student" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    again = load(tmp_path / "student", dtype="bfloat16").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.model.state_dict().items())


def test_files_that_the_base_lacks_are_not_left_behind(nano: AsrModel, nano_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(nano_folder, tmp_path / "base"))
    (base / "generation_config.json").unlink()

    save_checkpoint(nano.model, tmp_path / "student", base=base, dtype="float32")

    assert not (tmp_path / "student" / "generation_config.json").exists()


def test_folder_that_exists_is_replaced_as_a_whole(nano: AsrModel, nano_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "stale.bin").write_bytes(b"old")

    save_checkpoint(nano.model, folder, base=nano_folder, dtype="float32")

    assert not (folder / "stale.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_nothing_is_left_under_the_final_name_when_saving_fails(
    nano: AsrModel, tmp_path: Path, nano_folder: Path
) -> None:
    base = Path(shutil.copytree(nano_folder, tmp_path / "base"))
    (base / "config.json").unlink()

    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        save_checkpoint(nano.model, tmp_path / "student", base=base, dtype="float32")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
