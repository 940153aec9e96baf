"""Greedy decoding of a batch of utterances, with the log-probability of every token.

The end token comes from the tokenizer: ``generate`` of the reference model has the real model's ids built in and does
not stop on a checkpoint with another vocabulary.

Dimension key: B utterances, T prompt positions (padded on the left), D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from qad_dist.asr.audio_tower import encode, num_audio_tokens
from qad_dist.asr.load import AsrModel
from qad_dist.head import FrozenHead
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a model wrote for one utterance."""

    token_ids: tuple[int, ...]
    """The response as generated, end token included if it came."""
    token_logprobs: tuple[float, ...]
    """Natural log-probability of each."""
    text: str
    language: str | None
    ended_by: str


@torch.no_grad()
def transcribe(model: AsrModel, mels: Sequence[Tensor], *, max_response_tokens: int) -> list[Hypothesis]:
    """Decode utterances together, greedily, in automatic language mode.

    Args:
        model: Teacher or student.
        mels: ``[M, F]`` each, from :func:`~qad_dist.asr.mel.log_mel`; utterances of similar length waste least.
        max_response_tokens: A response that reaches it is cut and marked ``length``.

    Returns:
        One hypothesis per utterance, in order.
    """
    embeddings_BTD, mask_BT = _embed_prompts(model, mels)
    cache = DynamicCache()
    position_B = mask_BT.sum(1)
    hidden_BTD = _decode(model, embeddings_BTD, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0), cache)
    running_B = torch.arange(len(mels), device=model.device)
    token_ids: list[list[int]] = [[] for _ in mels]
    logprobs: list[list[float]] = [[] for _ in mels]
    head = FrozenHead(model.head_weight_VD)
    for _ in range(max_response_tokens):
        logits_BV = head(hidden_BTD[:, -1])
        best_B = logits_BV.argmax(-1)
        logprob_B = logits_BV.gather(1, best_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
        for utterance, token, logprob in zip(running_B.tolist(), best_B.tolist(), logprob_B.tolist(), strict=True):
            token_ids[utterance].append(token)
            logprobs[utterance].append(logprob)
        going_on = (best_B != model.prompt.end_id).nonzero().squeeze(1)
        if len(going_on) == 0:
            break
        if len(going_on) < len(running_B):  # an utterance that has ended costs nothing any more
            running_B, best_B = running_B[going_on], best_B[going_on]
            position_B, mask_BT = position_B[going_on], mask_BT[going_on]
            cache.batch_select_indices(going_on)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(running_B), 1)], dim=1)
        embeddings_B1D = model.decoder.embed_tokens(best_B)[:, None]
        hidden_BTD = _decode(model, embeddings_B1D, mask_BT, position_B[:, None], cache)
        position_B = position_B + 1
    return [_hypothesis(model, ids, values) for ids, values in zip(token_ids, logprobs, strict=True)]


def _embed_prompts(model: AsrModel, mels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts with the audio in place: ``[B, T, D]``, padded on the left, and the int64 mask ``[B, T]``."""
    lengths_B = torch.tensor([mel.shape[1] for mel in mels])
    mel_MF = torch.cat(mels, dim=1).to(model.device)
    audio_PD = encode(model.audio_tower, mel_MF, lengths_B, audio_attention=model.audio_attention)
    prompts = [model.prompt.build(num_audio_tokens(int(frames))) for frames in lengths_B]
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[model.prompt.end_id] * (longest - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    embeddings_BTD = model.decoder.embed_tokens(ids_BT)
    embeddings_BTD[ids_BT == model.prompt.audio_id] = audio_PD
    return embeddings_BTD, mask_BT


def _decode(model: AsrModel, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    return model.decoder(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _hypothesis(model: AsrModel, token_ids: list[int], logprobs: list[float]) -> Hypothesis:
    text, language = model.prompt.parse(token_ids)
    ended = ENDED_BY_END_TOKEN if token_ids[-1] == model.prompt.end_id else ENDED_BY_LENGTH
    return Hypothesis(tuple(token_ids), tuple(logprobs), text, language, ended)
