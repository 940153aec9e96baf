"""What qwen-asr itself makes of a checkpoint: the side to compare with, in ``launch/check.py`` and in tests.

Nothing here uses this project's prompt, mel, audio tower or decoding; everything is asked of qwen-asr's own processor
and model, or read from the files.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qwen_asr import Qwen3ASRModel
from qwen_asr.core.transformers_backend.processing_qwen3_asr import _get_feat_extract_output_lengths
from qwen_asr.inference.utils import split_audio_into_chunks
from torch import Tensor, nn
from transformers import AutoModel

from qad_dist.asr.checkpoint import model_errors
from qad_dist.linears import LINEARS
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


@dataclass(frozen=True, slots=True)
class ReferenceInputs:
    """What qwen-asr's processor feeds the model for one utterance."""

    input_ids: list[int]
    mel_MF: Tensor
    """float32, all frames valid."""


def prompt_text(processor: Any) -> str:
    """The prompt of one utterance as text, before its audio token is repeated.

    Raises:
        ModelError: There is no chat template, or it cannot be rendered.
    """
    with model_errors("the chat template must render a prompt"):
        return _wrapper(processor)._build_text_prompt("", None)


def reference_inputs(processor: Any, audio_A: np.ndarray) -> ReferenceInputs:
    """Ask qwen-asr's processor for the inputs of one utterance (float32 mono at 16 kHz, as it is).

    Raises:
        ModelError: It cannot make them.
    """
    text = prompt_text(processor)
    with model_errors("preprocessor_config.json must suit speech at 16 kHz"):
        inputs = processor(text=[text], audio=[audio_A], return_tensors="pt", padding=True)
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
    """The model of a config on the meta device: names and shapes of everything, no memory.

    Raises:
        ModelError: No model can be made of it.
    """
    nameless = copy.deepcopy(config)
    nameless._name_or_path = ""  # where ModelOpt's checkpointing is on, it would look there for quantizers
    with model_errors(f"{config._name_or_path}/config.json must describe a model"), torch.device("meta"):
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
    attention = ((queries, width), (keys, width), (keys, width), (width, queries))
    shapes = (*attention, (inner, width), (inner, width), (width, inner))
    return {
        f"thinker.model.layers.{layer}.{name}": shape
        for layer in range(text.num_hidden_layers)
        for name, shape in zip(LINEARS, shapes, strict=True)
    }


def _wrapper(processor: Any) -> Qwen3ASRModel:
    """qwen-asr's own class around a processor; its model is not touched by building prompts."""
    return Qwen3ASRModel(backend="transformers", model=nn.Linear(1, 1), processor=processor)
