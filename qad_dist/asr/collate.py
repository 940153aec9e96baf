"""Utterances and their responses to one packed :class:`~qad_dist.batch.Batch`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.mel import num_frames
from qad_dist.asr.prompt import Prompt
from qad_dist.batch import Batch
from shards.schema import SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One utterance with the response to distil."""

    key: str
    mel_MF: Tensor
    """From :func:`~qad_dist.asr.mel.log_mels`."""
    response_ids: Sequence[int]
    """Language tag to end token, without the tag if the prompt tells the language."""
    prompt_language: str | None = None
    """What the prompt tells; None in automatic mode."""
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    """Of each row of the utterance; both 0 where it must not count."""


def num_packed_tokens(
    prompt: Prompt, *, duration_seconds: float, num_response_tokens: int, language: str | None = None
) -> int:
    """Positions that an utterance takes in a batch: prompt, audio and response.

    Args:
        prompt: The model's.
        duration_seconds: Of the utterance.
        num_response_tokens: Of its response.
        language: What the prompt tells; None in automatic mode.
    """
    frames = num_frames(round(duration_seconds * SAMPLE_RATE_HZ))
    return prompt.num_prompt_tokens(num_audio_tokens(frames), language=language) + num_response_tokens


def collate(examples: Sequence[Example], *, prompt: Prompt) -> Batch:
    """Pack utterances one behind the other.

    Args:
        examples: At least one. Without responses they are prompts, for decoding: a batch without rows.
        prompt: The model's prompt.

    Returns:
        A batch on the host. The last token of each response is in it, although nothing follows it: its row is the one
        before, and leaving it out would give utterances two lengths.
    """
    ids: list[int] = []
    positions: list[int] = []
    boundaries, rows, targets = [0], [], []
    audio_positions: list[int] = []
    for example in examples:
        audio_tokens = num_audio_tokens(example.mel_MF.shape[1])
        prompt_ids = prompt.build(audio_tokens, language=example.prompt_language)
        start = len(ids)
        # Counted, not searched for: a response may hold the placeholder's id, and no audio belongs there.
        first_audio = start + len(prompt.prefix_ids)
        audio_positions += range(first_audio, first_audio + audio_tokens)
        ids += [*prompt_ids, *example.response_ids]
        positions += range(len(ids) - start)
        boundaries.append(len(ids))
        first_row = start + len(prompt_ids) - 1
        rows += range(first_row, first_row + len(example.response_ids))
        targets += example.response_ids
    counts = torch.tensor([len(example.response_ids) for example in examples])
    return Batch(
        keys=tuple(example.key for example in examples),
        input_ids_N=torch.tensor(ids),
        position_ids_N=torch.tensor(positions),
        cu_seqlens_U1=torch.tensor(boundaries, dtype=torch.int32),
        audio_positions_P=torch.tensor(audio_positions),
        mel_MF=torch.cat([example.mel_MF for example in examples], dim=1),
        mel_lengths_U=torch.tensor([example.mel_MF.shape[1] for example in examples]),
        rows_R=torch.tensor(rows, dtype=torch.int64),
        targets_R=torch.tensor(targets, dtype=torch.int64),
        kl_weight_R=torch.tensor([e.kl_weight for e in examples]).repeat_interleave(counts),
        ce_weight_R=torch.tensor([e.ce_weight for e in examples]).repeat_interleave(counts),
        weighted_rows=sum(len(e.response_ids) for e in examples if e.kl_weight or e.ce_weight),
    )
