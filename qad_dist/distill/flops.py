"""Floating-point operations that a training step cannot do without: what its speed is measured against. Pure.

Counted are products of matrices and convolutions, two operations for each multiplication with its addition; norms,
softmax, rotary angles and fake quantization are below 1 %. A step encodes the audio once, runs the teacher forward
and the student forward and backward (which is two forwards more), and applies the frozen LM head to response rows
only: to the states of both, and once more for the gradient of the student's. Head, embeddings and audio tower get no
gradient. That of the first layer's input, which nobody needs either, is counted as if it were computed.
"""

from dataclasses import dataclass
from typing import Any

CONVOLUTIONS = 3
"""Of the audio tower: each 3 x 3, halving mel bins and frames, rounding up."""
CHUNK_FRAMES = 100
FRAMES_PER_SECOND = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that its operations depend on."""

    width: int
    num_layers: int
    attention_width: int
    """Query heads times head width."""
    key_value_width: int
    """Key-value heads times head width."""
    feed_forward: int
    vocabulary: int
    tower_width: int
    tower_layers: int
    tower_feed_forward: int
    tower_channels: int
    num_mel_bins: int

    @classmethod
    def from_configs(cls, decoder: Any, tower: Any) -> "ModelShape":
        """Of a checkpoint's ``text_config`` and ``audio_config``."""
        return cls(
            width=decoder.hidden_size,
            num_layers=decoder.num_hidden_layers,
            attention_width=decoder.num_attention_heads * decoder.head_dim,
            key_value_width=decoder.num_key_value_heads * decoder.head_dim,
            feed_forward=decoder.intermediate_size,
            vocabulary=decoder.vocab_size,
            tower_width=tower.d_model,
            tower_layers=tower.encoder_layers,
            tower_feed_forward=tower.encoder_ffn_dim,
            tower_channels=tower.downsample_hidden_size,
            num_mel_bins=tower.num_mel_bins,
        )

    def tower_flops(self, *, audio_seconds: float, audio_tokens: int, audio_pairs: int) -> float:
        """The audio tower, forward.

        Args:
            audio_seconds: Of mel frames; a fraction of a second is counted as such.
            audio_tokens: What comes out.
            audio_pairs: Of a token with one that it attends to, itself included; without those of padding.
        """
        bins, frames, channels_in, convolutions = self.num_mel_bins, CHUNK_FRAMES, 1, 0
        for _ in range(CONVOLUTIONS):
            bins, frames = (bins + 1) // 2, (frames + 1) // 2
            convolutions += 2 * bins * frames * 9 * channels_in * self.tower_channels
            channels_in = self.tower_channels
        projections = self.tower_width * (bins * self.tower_channels + self.tower_width + self.width)
        layer = self.tower_width * (4 * self.tower_width + 2 * self.tower_feed_forward)
        return (
            convolutions * audio_seconds * FRAMES_PER_SECOND / CHUNK_FRAMES
            + 2 * (projections + self.tower_layers * layer) * audio_tokens
            + 4 * self.tower_width * audio_pairs * self.tower_layers
        )

    def decoder_flops(self, *, tokens: int, pairs: int) -> float:
        """The decoder's layers, forward.

        Args:
            tokens: Of prompts and responses.
            pairs: Of a token with one that it attends to, itself included: ``n (n + 1) / 2`` of an utterance of ``n``.
        """
        layer = self.width * (2 * self.attention_width + 2 * self.key_value_width + 3 * self.feed_forward)
        return self.num_layers * (2 * layer * tokens + 4 * self.attention_width * pairs)

    def head_flops(self, *, rows: int) -> float:
        """The LM head once."""
        return 2 * self.width * self.vocabulary * rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is in a micro-batch."""

    tokens: int
    pairs: int
    rows: int
    """Response tokens."""
    audio_seconds: float
    audio_tokens: int
    audio_pairs: int


def step_flops(shape: ModelShape, work: Work, *, teacher_runs: bool = True) -> float:
    """Operations from a micro-batch to its gradient.

    Args:
        shape: Of teacher and student.
        work: What is in the batch.
        teacher_runs: Whether the teacher's hidden states are computed; stored ones only need the head.
    """
    tower = shape.tower_flops(
        audio_seconds=work.audio_seconds, audio_tokens=work.audio_tokens, audio_pairs=work.audio_pairs
    )
    passes = 4 if teacher_runs else 3
    return (
        tower
        + passes * shape.decoder_flops(tokens=work.tokens, pairs=work.pairs)
        + 3 * shape.head_flops(rows=work.rows)
    )
