"""DeepSpeed settings: what is refused before any engine is built. The engine itself is tested with ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from qad_dist.runtime.zero import read_deepspeed_settings
from shards.errors import ConfigError


def write(folder: Path, settings: Any) -> str:
    path = folder / "zero.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_settings_of_this_project_are_read(root: Path, stage: int) -> None:
    settings = read_deepspeed_settings(str(root / "configs" / "deepspeed" / f"zero{stage}.json"))

    assert settings["zero_optimization"]["stage"] == stage
    # What equal gradients on any number of ranks need.
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"
    assert settings["gradient_accumulation_steps"] == 1
    assert "auto" not in json.dumps(settings)


def test_missing_file_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.deepspeed must be a DeepSpeed JSON file, got '.*none\.json' .*see"):
        read_deepspeed_settings(str(tmp_path / "none.json"))


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.deepspeed must be a DeepSpeed JSON file"):
        read_deepspeed_settings(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"zero_optimization: {stage: 2}", b"\xff\xfe"])
def test_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zero.json").write_bytes(content)

    with pytest.raises(ConfigError, match=r"train\.deepspeed must be a DeepSpeed JSON file, got '.*zero\.json'"):
        read_deepspeed_settings(str(tmp_path / "zero.json"))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"zero_optimization": {"stage": 0}}, "0"),
        ({"zero_optimization": {"stage": 4}}, "4"),
        ({"zero_optimization": {"stage": "2"}}, "'2'"),
        ({"zero_optimization": {"stage": True}}, "True"),
        ({"zero_optimization": {}}, "None"),
        ({"zero_optimization": 3}, "None"),
        ({}, "None"),
        ([], "None"),
    ],
)
def test_other_zero_stages_are_refused(tmp_path: Path, settings: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"zero\.json: zero_optimization\.stage must be 1, 2 or 3, got {found};"):
        read_deepspeed_settings(write(tmp_path, settings))


@pytest.mark.parametrize("name", ["bf16", "fp16", "gradient_clipping", "optimizer", "scheduler", "train_batch_size"])
def test_settings_that_the_runs_yaml_decides_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 2}, name: {"enabled": True}})

    with pytest.raises(ConfigError, match=rf"zero\.json: {name} must be left to the run's YAML, got .*; remove it"):
        read_deepspeed_settings(path)


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "train_micro_batch_size_per_gpu"])
@pytest.mark.parametrize("value", [2, "auto"])
def test_batch_sizes_other_than_1_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 2}, name: value})

    with pytest.raises(ConfigError, match=rf"zero\.json: {name} must be 1, got {value!r}; remove it and set"):
        read_deepspeed_settings(path)


@pytest.mark.parametrize("name", ["compute_grad_norm", "offload_optimizer", "offload_param", "zenflow"])
def test_what_the_engine_decides_or_does_not_do_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 2, name: False}})

    with pytest.raises(ConfigError, match=rf"zero\.json: zero_optimization\.{name} must be left to .*, got False; rem"):
        read_deepspeed_settings(path)


@pytest.mark.parametrize("found", ["bf16", None])
@pytest.mark.parametrize("name", ["data_types.grad_accum_dtype", "communication_data_type"])
def test_sums_of_gradients_in_another_dtype_are_refused(tmp_path: Path, name: str, found: Any) -> None:
    settings = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    read_deepspeed_settings(write(tmp_path, {"zero_optimization": {"stage": 2}, **settings}))
    changed = {name: found} if "." not in name else {"data_types": {"grad_accum_dtype": found}}
    path = write(tmp_path, {"zero_optimization": {"stage": 2}, **settings, **changed})

    with pytest.raises(
        ConfigError, match=rf"zero\.json: {name.replace('.', '[.]')} must be 'fp32', got {found!r}; see"
    ):
        read_deepspeed_settings(path)
