"""Batch: the hand-over from ``asr`` to ``distill``. Packed: utterances stand one behind the other, without padding.

Dimension key: N packed tokens, U utterances, R response rows, F mel frames of all utterances, M mel bins, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch.

    Row ``r`` of the loss reads the hidden state at ``rows_R[r]`` and is judged on the token that follows it,
    ``targets_R[r]``; every response token of every utterance (end token included) has exactly one row.
    """

    keys: tuple[str, ...]
    input_ids_N: Tensor
    """int64; audio placeholders stand where the audio tower's output goes."""
    position_ids_N: Tensor
    """int64, restarting at 0 for each utterance. The model's three mRoPE rows are equal for speech."""
    cu_seqlens_U1: Tensor
    """int32 [U+1], on the host: starts of the utterances, then N."""
    audio_positions_P: Tensor
    """int64 [P]: where in N the audio tower's P output tokens go, in order."""
    mel_MF: Tensor
    """float32 [M, F]: log-mel of all utterances, side by side."""
    mel_lengths_U: Tensor
    """int64 [U], on the host: frames of each utterance; sums to F."""
    rows_R: Tensor
    """int64: positions in N whose next token is a response token."""
    targets_R: Tensor
    """int64: that token."""
    kl_weight_R: Tensor
    """float32: weight of each row in the KL term; 0 leaves it out."""
    ce_weight_R: Tensor
    """float32: weight of each row in the cross-entropy term."""
    weighted_rows: int
    """Rows that count, having a weight: R, but for utterances that could not be read; 0 for a batch that only keeps the
    ranks together. On the host, so that nobody waits."""
    teacher_RD: Tensor | None = None
    """The teacher's stored hidden states at the rows, behind its final norm, bfloat16; None where it runs itself."""

    @property
    def num_tokens(self) -> int:
        """N: all tokens, prompt and response."""
        return self.input_ids_N.numel()

    @property
    def num_utterances(self) -> int:
        """U."""
        return len(self.keys)

    @property
    def num_rows(self) -> int:
        """R: response tokens."""
        return self.rows_R.numel()

    def owners(self) -> Tensor:
        """``[R]``, int64: the place of each row's utterance; of a batch on the host."""
        return torch.searchsorted(self.cu_seqlens_U1[1:].long(), self.rows_R, right=True)

    def token_weights(self) -> Tensor:
        """``[N]``, float32: the KL weight of each token's utterance; of a batch on the host."""
        weight_U = torch.zeros(len(self.cu_seqlens_U1) - 1).scatter_(0, self.owners(), self.kl_weight_R)
        return weight_U.repeat_interleave(self.cu_seqlens_U1.diff().long())

    def without_weight(self) -> "Batch":
        """The same batch with all loss weights 0: what a rank runs when the plan has nothing left for it."""
        zeros = torch.zeros_like(self.kl_weight_R)
        return replace(self, kl_weight_R=zeros, ce_weight_R=zeros, weighted_rows=0)

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors that the model reads; lengths stay on the host, where shapes are decided."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__dataclass_fields__
            if name not in ("keys", "cu_seqlens_U1", "mel_lengths_U", "weighted_rows")
            and (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)
