"""What a run will need, before anything runs: memory of a rank in training, and disk per stage. Pure: no I/O.

Counts come from the model's ``config.json`` alone. The formulas are for planning: exact for weights and optimizer,
rules of thumb for activations and disk.
"""

from dataclasses import dataclass
from typing import Any

from qad_dist.config import RunConfig
from qad_dist.runtime.zero import ranks_that_share
from shards.errors import ModelError

BYTES_OF = {"bfloat16": 2, "float16": 2, "float32": 4}

MEMORY_FORMULA = (
    "shared frozen parts + teacher's decoder + student's decoder [/ ranks under ZeRO-3] + its copy that decodes "
    "+ fp32 gradients [/ ranks under ZeRO-2, 3] + fp32 master, m and v [/ ranks under ZeRO] + activations + logits"
)

# FLAC of speech at 16 kHz and 16 bit; 32,000 bytes a second before it.
_FLAC_SHARE = 0.55
_LABEL_BYTES_PER_HOUR = 1_500_000
_SCORE_BYTES_PER_HOUR = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Weights of a Qwen3-ASR, and the widths that activations follow from."""

    decoder_layers: int
    """Number of layers."""
    decoder_weights: int
    """Of these layers: what is trained and sharded."""
    shared_weights: int
    """Audio tower, embedding (tied to the head) and final norm."""
    hidden: int
    intermediate: int
    vocabulary: int


def model_size(config: dict[str, Any]) -> ModelSize:
    """Count the weights that a ``config.json`` describes.

    Raises:
        ModelError: It is not a Qwen3-ASR's.
    """
    try:
        text, audio = config["thinker_config"]["text_config"], config["thinker_config"]["audio_config"]
        hidden, intermediate = text["hidden_size"], text["intermediate_size"]
        head, layers, vocabulary = text["head_dim"], text["num_hidden_layers"], text["vocab_size"]
        queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
        layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * intermediate + 2 * hidden + 2 * head
        embedding = vocabulary * hidden * (1 if text.get("tie_word_embeddings", True) else 2)
        tower = _tower_weights(audio)
    except (KeyError, TypeError) as cause:
        raise ModelError(f"config.json must describe a Qwen3-ASR, got one without {cause}; check model.path") from cause
    return ModelSize(
        decoder_layers=layers,
        decoder_weights=layers * layer,
        shared_weights=embedding + hidden + tower,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
    )


def memory_per_rank(run: RunConfig, size: ModelSize, *, zero_stage: int, world_size: int) -> dict[str, float]:
    """Bytes of each part of :data:`MEMORY_FORMULA` on one rank during training; stage 0 shards nothing."""
    each = BYTES_OF[run.model.dtype]
    decoder, tokens = size.decoder_weights, run.train.micro_batch_tokens

    def ranks(kind: str) -> int:
        return ranks_that_share(kind, zero_stage=zero_stage, world_size=world_size)

    # What autograd keeps of one layer for one token: norms, q, k, v, attention, gate, up and their product, each once
    # as it was and once fake-quantized.
    kept_per_token = 2 * size.decoder_layers * (8 * size.hidden + 5 * size.intermediate)
    if run.train.compares_layers:  # of each layer the teacher's state, and the gradient of the distance from it
        kept_per_token += 2 * size.decoder_layers * size.hidden
    return {
        "shared frozen parts": size.shared_weights * each,
        "teacher's decoder": 0 if run.train.teacher == "cached" else decoder * each,
        "student's decoder": decoder * each / ranks("weights"),
        "copy that decodes": decoder * each if run.train.decode_utterances else 0,
        "gradients": decoder * 4 / ranks("gradients"),
        "master, m and v": decoder * 12 / ranks("masters"),
        "activations": tokens * kept_per_token * each,
        # Both models' logits, their difference, a copy for the cross-entropy, and what a product takes, in fp32.
        "logits": run.train.loss_chunk_rows * size.vocabulary * 4 * 5,
    }


def disk_of_stages(run: RunConfig, size: ModelSize | None, *, hours: float | None) -> dict[str, float | None]:
    """Bytes that each stage leaves in the run folder; None where model or hours are unknown."""
    weights = None if size is None else (size.decoder_weights + size.shared_weights) * BYTES_OF[run.model.dtype]
    # A checkpoint: fp32 master, m and v of the decoder. The newest ones, one being written, and the best student.
    checkpoint = None if size is None else size.decoder_weights * 12
    return {
        "pack": None if hours is None else hours * 3600 * 32_000 * _FLAC_SHARE,
        "label": None if hours is None else hours * _LABEL_BYTES_PER_HOUR,
        "quantize": weights,
        "train": None if checkpoint is None else checkpoint * (run.train.keep_checkpoints + 2),
        "score": None if hours is None else hours * _SCORE_BYTES_PER_HOUR,
        "export": weights,
    }


def _tower_weights(audio: dict[str, Any]) -> int:
    width, inner, output = audio["d_model"], audio["encoder_ffn_dim"], audio["output_dim"]
    channels, bins = audio["downsample_hidden_size"], audio["num_mel_bins"]
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    convolutions = (9 * channels + channels) + 2 * (9 * channels * channels + channels)
    after_three_halvings = (((bins + 1) // 2 + 1) // 2 + 1) // 2
    projections = channels * after_three_halvings * width + width * width + width + width * output + output
    return audio["encoder_layers"] * layer + convolutions + projections + 2 * width
