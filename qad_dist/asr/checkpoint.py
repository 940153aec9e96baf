"""A checkpoint's files: config, processor and stored weights, each read by itself, without building the model."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qwen_asr  # noqa: F401  registers the model with transformers' Auto classes
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from shards.errors import ModelError, QadError

HEAD, EMBEDDING = "thinker.lm_head.weight", "thinker.model.embed_tokens.weight"
"""Names of the LM head and of the weight that it is tied to; a tied head is stored or not."""
USED_PARTS = ("thinker.model.", "thinker.audio_tower.")
"""A stored weight below these has a place in the model, or config and weights are of two different models."""

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"

_NUMBERS = {
    "text_config": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim"),
    ),
    "audio_config": ("num_mel_bins", "n_window", "n_window_infer", "output_dim", "encoder_layers"),
}


@contextmanager
def model_errors(rule: str) -> Generator[None]:
    """Turn whatever the block raises into a ModelError: ``<rule>, got: <reason>``.

    For libraries that build something from a checkpoint's files: a wrong value there leads to any kind of exception.
    """
    try:
        yield
    except QadError:
        raise
    except Exception as cause:
        raise ModelError(f"{rule}, got: {first_line(cause)}; copy the base model's files again") from cause


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception's text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def missing_files(folder: Path) -> list[str]:
    """Files that a checkpoint needs and this folder lacks; alternatives are joined by `` or ``."""
    alternatives = (
        ("config.json",),
        ("preprocessor_config.json",),
        ("tokenizer_config.json",),
        ("tokenizer.json", "vocab.json"),
        ("chat_template.jinja", "chat_template.json"),
        (WEIGHTS_FILE, INDEX_FILE),
    )
    return [" or ".join(names) for names in alternatives if not any((folder / name).is_file() for name in names)]


def load_config(folder: Path) -> Any:
    """The checkpoint's config.

    Raises:
        ModelError: It is unreadable, not of this family, or a number that shapes follow from is none.
    """
    path = folder / "config.json"
    with model_errors(f"{path} must be a Qwen3-ASR's config"):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "qwen3_asr":
            raise ModelError(f"{path} must name model_type 'qwen3_asr', got {config.model_type!r}; name another folder")
        for section, names in _NUMBERS.items():
            for name in names:
                value = getattr(getattr(config.thinker_config, section), name)
                if type(value) is not int or value < 1:
                    raise ModelError(
                        f"{path}: {section}.{name} must be a positive whole number, got {value!r}; copy it again"
                    )
    return config


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor, exactly as qwen-asr loads it.

    Raises:
        ModelError: Tokenizer or preprocessor files are missing or unreadable.
    """
    files = "tokenizer_config.json, tokenizer.json or preprocessor_config.json"
    with model_errors(f"{folder} must hold a tokenizer and a preprocessor ({files})"):
        return AutoProcessor.from_pretrained(folder, fix_mistral_regex=True)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every stored tensor, from the safetensors headers alone.

    Raises:
        ModelError: A weights file is missing or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        with model_errors(f"{path} must be a safetensors file"), safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def stored_tensor(folder: Path, name: str) -> Tensor:
    """One stored tensor, by its name in :func:`stored_shapes`."""
    for path in _weight_files(folder):
        with model_errors(f"{path} must be a safetensors file"), safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  safe_open has no __contains__
                return file.get_tensor(name)
    raise ModelError(f"{folder} must hold the weight {name}, got none of that name; copy it again")


def stored_head(folder: Path) -> str:
    """How the LM head is stored: ``once`` (only as the embedding), ``twice`` (equal to it) or ``own`` (other values).

    The values in the file decide: where the config says that it is tied, transformers replaces what was stored.
    """
    names = stored_shapes(folder)
    if HEAD not in names:
        return "once"
    return "twice" if torch.equal(stored_tensor(folder, HEAD), stored_tensor(folder, EMBEDDING)) else "own"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    with model_errors(f"{index} must hold a weight_map"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
