"""Load a Qwen3-ASR checkpoint as this project uses it: frozen, with segment attention, with its prompt."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from qad_dist.asr.attention import SEGMENT_ATTENTION, register
from qad_dist.asr.checkpoint import HEAD, USED_PARTS, first_line, load_config, load_processor, model_errors, stored_head
from qad_dist.asr.mel import extractor_mismatches
from qad_dist.asr.prompt import Prompt
from qad_dist.config.model import ModelConfig
from qad_dist.linears import LINEARS
from qad_dist.runtime.logs import prints_as_debug
from shards.errors import ModelError

log = logging.getLogger(__name__)

MODELOPT_STATE = "modelopt_state.pth"
"""Beside the weights of a folder that ModelOpt quantized."""
PROCESSOR_FILES = (
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "generation_config.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json",
)  # fmt: skip
"""What a checkpoint holds beside config and weights; copied verbatim from the base model, never re-saved."""


@dataclass(frozen=True, slots=True)
class AsrModel:
    """A loaded checkpoint and everything needed to talk to it."""

    model: Any
    """``Qwen3ASRForConditionalGeneration``, in evaluation mode, no parameter requiring gradients."""
    processor: Any
    prompt: Prompt
    folder: Path
    audio_attention: str

    @property
    def audio_tower(self) -> nn.Module:
        """``thinker.audio_tower``."""
        return self.model.thinker.audio_tower

    @property
    def decoder(self) -> Any:
        """``thinker.model``: embeddings, layers, final norm."""
        return self.model.thinker.model

    @property
    def head_weight_VD(self) -> Tensor:
        """The tied LM head."""
        return self.model.thinker.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight_VD.device

    @property
    def extractor(self) -> Any:
        """The feature extractor for :func:`qad_dist.asr.mel.log_mel`."""
        return self.processor.feature_extractor


def resolve_model_folder(path: str, revision: str | None = None, *, setting: str = "model.path") -> Path:
    """Folder of a checkpoint; a hub id is downloaded first, because a quantizer state is only found in a folder.

    Args:
        path: Folder or hub id.
        revision: Commit of the hub id.
        setting: The one that named it, for messages.

    Raises:
        ModelError: It is neither a checkpoint's folder nor a hub id that can be had.
    """
    folder = Path(path)
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
            raise ModelError(
                f"{setting} must be a checkpoint's folder or a hub id within reach, got {path!r} "
                f"({first_line(cause)}); download it and name the folder"
            ) from cause
    if not (folder / "config.json").is_file():
        raise ModelError(f"{setting} must be a folder with config.json, got {path!r}; name a Qwen3-ASR checkpoint")
    return folder


def load_model(
    folder: Path, *, dtype: str, audio_attention: str, device: torch.device, quantized: bool = False
) -> AsrModel:
    """Load a checkpoint.

    Args:
        folder: From :func:`resolve_model_folder`.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        audio_attention: ``windowed`` or ``full``.
        device: Where to put it.
        quantized: Whether ModelOpt's state is expected beside the weights. The caller has enabled ModelOpt's
            checkpointing (``quant.state``) then; otherwise the state would be ignored without a word.

    Raises:
        ModelError: Not a Qwen3-ASR checkpoint, files missing or unreadable, or quantized when it should not be
            (a teacher) or not when it should.
    """
    if (folder / MODELOPT_STATE).exists() != quantized:
        have, want = ("", "no ") if not quantized else ("no ", "")
        raise ModelError(
            f"{folder} must have {want}{MODELOPT_STATE} here, got {have}such file; "
            f"name a {'quantized' if quantized else 'full-precision'} checkpoint"
        )
    register()
    config, processor = load_config(folder), load_processor(folder)
    if wrong := extractor_mismatches(processor.feature_extractor, config.thinker_config.audio_config.num_mel_bins):
        raise ModelError(f"{folder}/preprocessor_config.json: {wrong[0]}; copy the base model's files again")
    if stored_head(folder) == "own":
        raise ModelError(f"{folder} must tie lm_head to the embedding, got a head of its own; it is not supported")
    with model_errors(f"{folder} must be a complete Qwen3-ASR checkpoint"), prints_as_debug(log):  # prints: ModelOpt's
        model, report = AutoModel.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
    # The tied head is stored once or twice; both are complete.
    missing = [name for name in report["missing_keys"] if name != HEAD]
    if missing or report["mismatched_keys"]:
        names = [*missing, *(str(entry[0]) for entry in report["mismatched_keys"])]
        raise ModelError(f"{folder} must hold every weight of its config, got {len(names)} missing, first {names[0]}")
    if unknown := sorted(name for name in report["unexpected_keys"] if name.startswith(USED_PARTS)):
        raise ModelError(
            f"{folder} must hold no weight that its config has no place for, got {len(unknown)}, first {unknown[0]}; "
            "copy all files of one checkpoint"
        )
    model.thinker.lm_head.weight = model.thinker.model.embed_tokens.weight
    for part in (model.thinker.audio_tower, model.thinker.model):
        part.config._attn_implementation = SEGMENT_ATTENTION
    model.eval().requires_grad_(False).to(device)
    loaded = AsrModel(model, processor, Prompt.from_processor(processor), folder, audio_attention)
    count_decoder_linears(loaded.decoder)
    return loaded


def load_teacher(config: ModelConfig, device: torch.device, *, dtype: str | None = None) -> AsrModel:
    """The full-precision model of a run's ``model:`` section (``dtype`` instead of the section's, if given)."""
    folder = resolve_model_folder(config.path, config.revision)
    return load_model(folder, dtype=dtype or config.dtype, audio_attention=config.audio_attention, device=device)


def count_decoder_linears(decoder: Any) -> int:
    """Number of Linear layers in the decoder.

    Raises:
        ModelError: It is not 7 for each layer: this project would quantize the wrong thing.
    """
    num_linears = sum(isinstance(module, nn.Linear) for module in decoder.modules())
    num_layers = len(decoder.layers)
    if num_linears != len(LINEARS) * num_layers:
        raise ModelError(
            f"the decoder must have {len(LINEARS)} Linear layers in each of its {num_layers} layers, "
            f"got {num_linears} in all; this architecture is not supported"
        )
    return num_linears


def state_hash(model: nn.Module) -> str:
    """Hex sha256 over a model's whole ``state_dict`` (names, dtypes, shapes, bytes; a tied head by both its names)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
