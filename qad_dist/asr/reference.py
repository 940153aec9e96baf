"""What qwen-asr itself makes of a checkpoint: the side to compare with, in ``launch/check.py`` and in tests.

Nothing here uses this project's prompt, mel, audio tower or decoding; everything is asked of qwen-asr's own processor
and model, or read from the files.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from qwen_asr import Qwen3ASRModel
from qwen_asr.core.transformers_backend.processing_qwen3_asr import _get_feat_extract_output_lengths
from qwen_asr.inference.utils import split_audio_into_chunks
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor

from shards.errors import ModelError
from shards.schema import SAMPLE_RATE_HZ

AUDIO_TOKEN = "<|audio_pad|>"  # noqa: S105  tokens of the prompt, not passwords
END_TOKEN = "<|im_end|>"  # noqa: S105
TEXT_TAG = "<asr_text>"
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", END_TOKEN),
    *("<|audio_start|>", "<|audio_end|>", AUDIO_TOKEN, TEXT_TAG),
)
"""Tokens of the prompt and the response; each must be one id."""

PROMPT_TEXT = (
    "<|im_start|>system\n<|im_end|>\n"
    f"<|im_start|>user\n<|audio_start|>{AUDIO_TOKEN}<|audio_end|><|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""What the model was trained on, for one utterance without context."""

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class ReferenceInputs:
    """What qwen-asr's processor feeds the model for one utterance."""

    input_ids: list[int]
    mel_MF: Tensor
    """float32, all frames valid."""


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
        ModelError: It is unreadable or not of this family.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as cause:
        raise ModelError(f"{folder}/config.json must be a model's config, got: {_first_line(cause)}") from cause
    if config.model_type != "qwen3_asr":
        raise ModelError(f"{folder}/config.json must name model_type 'qwen3_asr', got {config.model_type!r}")
    return config


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor, exactly as qwen-asr loads it.

    Raises:
        ModelError: Tokenizer or preprocessor files are unreadable.
    """
    try:
        return AutoProcessor.from_pretrained(folder, fix_mistral_regex=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as cause:
        reason = _first_line(cause)
        raise ModelError(
            f"{folder} must hold a tokenizer and a preprocessor, got: {reason}; copy them again"
        ) from cause


def prompt_text(processor: Any) -> str:
    """The prompt of one utterance as text, before its audio token is repeated.

    Raises:
        ModelError: There is no chat template, or it cannot be rendered.
    """
    try:
        return _wrapper(processor)._build_text_prompt("", None)
    except (ValueError, TypeError, KeyError, TemplateError) as cause:
        raise ModelError(f"the chat template must render a prompt, got: {_first_line(cause)}") from cause


def reference_inputs(processor: Any, audio_A: np.ndarray) -> ReferenceInputs:
    """Ask qwen-asr's processor for the inputs of one utterance (float32 mono at 16 kHz, as it is)."""
    inputs = processor(text=[prompt_text(processor)], audio=[audio_A], return_tensors="pt", padding=True)
    num_frames = int(inputs["feature_attention_mask"].sum())
    return ReferenceInputs(inputs["input_ids"][0].tolist(), inputs["input_features"][0, :, :num_frames])


def reference_audio_tokens(num_frames: Tensor) -> Tensor:
    """Audio tokens for each number of mel frames, by qwen-asr's formula."""
    return _get_feat_extract_output_lengths(num_frames)


def padded_length(num_audio_samples: int) -> int:
    """Samples that qwen-asr's ``transcribe`` hands to its processor for an utterance of that many."""
    silence = np.zeros(num_audio_samples, dtype=np.float32)
    ((chunk, _),) = split_audio_into_chunks(silence, SAMPLE_RATE_HZ, max_chunk_sec=1200.0)
    return len(chunk)


def reference_transcript(
    folder: Path, audio_A: np.ndarray, *, max_response_tokens: int, device: torch.device
) -> tuple[str, str | None]:
    """Transcribe one utterance with ``Qwen3ASRModel.transcribe`` in float32, automatic language.

    Under SDPA, its default, the audio tower attends over the whole utterance.

    Args:
        folder: The checkpoint.
        audio_A: float32 mono at 16 kHz.
        max_response_tokens: Where generation stops; on a small vocabulary qwen-asr does not stop by itself.
        device: Where to compute.

    Returns:
        Text and language (None if it named none).
    """
    model = load_with_qwen_asr(folder, dtype=torch.float32, device=device, max_response_tokens=max_response_tokens)
    return transcribe_with_qwen_asr(model, audio_A)


def load_with_qwen_asr(
    folder: Path, *, dtype: torch.dtype, device: torch.device, max_response_tokens: int
) -> Qwen3ASRModel:
    """Load a checkpoint as a user of qwen-asr does."""
    return Qwen3ASRModel.from_pretrained(
        str(folder), dtype=dtype, device_map=device, max_new_tokens=max_response_tokens
    )


def transcribe_with_qwen_asr(model: Qwen3ASRModel, audio_A: np.ndarray) -> tuple[str, str | None]:
    """Text and language (None if it named none) of one utterance: float32 mono at 16 kHz, automatic language."""
    (transcript,) = model.transcribe(audio=(audio_A, SAMPLE_RATE_HZ), language=None)
    return transcript.text, transcript.language or None


def empty_model(config: Any) -> nn.Module:
    """The model of a config on the meta device: names and shapes of everything, no memory."""
    nameless = copy.deepcopy(config)
    nameless._name_or_path = ""  # where ModelOpt's checkpointing is on, it would look there for quantizers
    with torch.device("meta"):
        return AutoModel.from_config(nameless)


def decoder_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name to ``(outputs, inputs)`` of every Linear layer below ``thinker.model``."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.startswith("thinker.model.") and isinstance(module, nn.Linear)
    }


def expected_linears(config: Any) -> dict[str, tuple[int, int]]:
    """The seven Linear layers of each decoder layer, as this project quantizes them, from the config's numbers."""
    text = config.thinker_config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {
        f"thinker.model.layers.{layer}.{name}": shape
        for layer in range(text.num_hidden_layers)
        for name, shape in shapes.items()
    }


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every stored tensor, from the safetensors headers alone.

    Raises:
        ModelError: A weights file is missing or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as cause:
            raise ModelError(f"{path} must be a safetensors file, got: {_first_line(cause)}; copy it again") from cause
    return shapes


def stored_tensor(folder: Path, name: str) -> Tensor:
    """One stored tensor, by its name in :func:`stored_shapes`."""
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  safe_open has no __contains__
                return file.get_tensor(name)
    raise ModelError(f"{folder} must hold the weight {name}, got none of that name")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError) as cause:
        raise ModelError(f"{index} must hold a weight_map, got: {_first_line(cause)}; copy it again") from cause
    return [folder / name for name in sorted(set(names))]


def _wrapper(processor: Any) -> Qwen3ASRModel:
    """qwen-asr's own class around a processor; its model is not touched by building prompts."""
    return Qwen3ASRModel(backend="transformers", model=nn.Linear(1, 1), processor=processor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
