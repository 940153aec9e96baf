"""The frozen audio tower on many utterances at once, equal to the reference utterance by utterance.

The reference loops over utterances. Here all 100-frame chunks of all utterances go through the convolutions together
and all windows through the layers together, with the same weights. Two of its habits are kept exactly:

* Its convolutions see an utterance shorter than one chunk with nothing behind it, but a longer utterance's last chunk
  padded with silence up to 100 frames. So behind the end of short utterances activations are set to 0 after each
  convolution, which is what "nothing" means to the next one.
* Attention reaches over ``n_window_infer`` frames (8 s) in ``windowed`` mode, over the utterance in ``full`` mode.

Dimension key: F frames, M mel bins, U utterances, C chunks, P audio tokens, D width.

Source: qwen_asr 0.0.6, ``Qwen3ASRAudioEncoder.forward``.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qad_dist.asr.attention import Segments

CHUNK_FRAMES = 100
TOKENS_PER_CHUNK = 13


def num_audio_tokens(num_frames: int) -> int:
    """Audio tokens of an utterance of ``num_frames`` mel frames (10 ms each): 13 per second, rounded up."""
    chunks, rest = divmod(num_frames, CHUNK_FRAMES)
    return chunks * TOKENS_PER_CHUNK + _after_convolutions(rest)


def _after_convolutions(num_frames: int) -> int:
    for _ in range(3):  # each halves, rounding up; 0 stays 0
        num_frames = (num_frames + 1) // 2
    return num_frames


@dataclass(frozen=True, slots=True)
class _Chunks:
    """All utterances cut into chunks of 100 frames."""

    gather_CF: Tensor
    """int64: frame of each cell; cells behind an utterance's end point at frame 0."""
    valid_CF: Tensor
    """bool: cells that hold a frame."""
    keep_CF: Tensor
    """bool: cells whose activations the convolutions keep (see the module's text)."""
    tokens_C: Tensor
    """int64: audio tokens of each chunk."""


def _cut(lengths_U: Tensor) -> _Chunks:
    num_chunks_U = (lengths_U + CHUNK_FRAMES - 1) // CHUNK_FRAMES
    utterance_C = torch.repeat_interleave(torch.arange(len(lengths_U)), num_chunks_U)
    first_chunk_U = F.pad(num_chunks_U.cumsum(0), (1, 0))[:-1]
    first_frame_U = F.pad(lengths_U.cumsum(0), (1, 0))[:-1]
    chunk_within_C = torch.arange(len(utterance_C)) - first_chunk_U[utterance_C]
    frame_within_CF = chunk_within_C[:, None] * CHUNK_FRAMES + torch.arange(CHUNK_FRAMES)
    valid_CF = frame_within_CF < lengths_U[utterance_C][:, None]
    gather_CF = torch.where(valid_CF, first_frame_U[utterance_C][:, None] + frame_within_CF, 0)
    keep_CF = valid_CF | (lengths_U[utterance_C] >= CHUNK_FRAMES)[:, None]
    tokens_C = valid_CF.sum(1)
    for _ in range(3):
        tokens_C = (tokens_C + 1) // 2
    return _Chunks(gather_CF, valid_CF, keep_CF, tokens_C)


def window_lengths(lengths_U: Tensor, *, window_frames: int | None) -> Tensor:
    """Lengths, in audio tokens, of the stretches that attend to themselves.

    Args:
        lengths_U: int64 mel frames per utterance, on the host.
        window_frames: The tower's ``n_window_infer``; None for one stretch per utterance.
    """
    tokens_U = [num_audio_tokens(frames) for frames in lengths_U.tolist()]
    if window_frames is None:
        return torch.tensor(tokens_U)
    window = window_frames // CHUNK_FRAMES * TOKENS_PER_CHUNK
    return torch.tensor([min(window, tokens - start) for tokens in tokens_U for start in range(0, tokens, window)])


@torch.no_grad()
def encode(tower: Any, mel_MF: Tensor, lengths_U: Tensor, *, audio_attention: str) -> Tensor:
    """Run the audio tower.

    Args:
        tower: ``thinker.audio_tower``, with segment attention (see ``asr.load``).
        mel_MF: Log-mel of all utterances side by side, any float dtype, on the tower's device.
        lengths_U: int64 frames per utterance, on the host, each at least 1.
        audio_attention: ``windowed`` or ``full``.

    Returns:
        ``[P, D]`` in the tower's dtype: the audio tokens of all utterances, in order.
    """
    device, dtype = mel_MF.device, tower.conv_out.weight.dtype
    chunks = _cut(lengths_U)
    valid_C1F = chunks.valid_CF.to(device)[:, None]
    mel_CMF = mel_MF[:, chunks.gather_CF.to(device).flatten()].unflatten(1, (-1, CHUNK_FRAMES)).transpose(0, 1)
    states = (mel_CMF.to(dtype) * valid_C1F)[:, None]  # [C, 1, M, F]
    keep_CF = chunks.keep_CF.to(device)
    convolved = []
    for part, keep in zip(states.split(tower.conv_chunksize), keep_CF.split(tower.conv_chunksize), strict=True):
        for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
            keep = keep[:, ::2]  # frame f of the output is centred on frame 2f of the input
            part = F.gelu(convolution(part)).mul_(keep[:, None, None, :])
        convolved.append(part)
    states = torch.cat(convolved).permute(0, 3, 1, 2).flatten(2)  # [C, 13, channels x mel]
    states = tower.conv_out(states.flatten(0, 1)).unflatten(0, (-1, TOKENS_PER_CHUNK))
    states = states + tower.positional_embedding.positional_embedding[: states.shape[1]].to(dtype)
    is_token_CP = torch.arange(TOKENS_PER_CHUNK) < chunks.tokens_C[:, None]
    hidden_PD = states.flatten(0, 1)[is_token_CP.flatten().nonzero().squeeze(1).to(device)]

    window_frames = tower.config.n_window_infer if audio_attention == "windowed" else None
    lengths_S = window_lengths(lengths_U, window_frames=window_frames)
    segments = Segments.from_lengths(lengths_S, causal=False, device=device)
    cu_seqlens = F.pad(lengths_S.cumsum(0), (1, 0)).to(device, torch.int32)
    for layer in tower.layers:
        hidden_PD = layer(hidden_PD, cu_seqlens, segments=segments)[0]
    return tower.proj2(tower.act(tower.proj1(tower.ln_post(hidden_PD))))
