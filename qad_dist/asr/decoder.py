"""The decoder on packed batches: what teacher and student share, and the stack of layers that tells them apart.

Teacher and student have the same frozen audio tower, embeddings, final norm and LM head. :func:`embed` therefore runs
once per micro-batch for both; only :class:`DecoderStack` runs twice, and only the student's is trained and sharded.

Dimension key: N packed tokens, R response rows, D width, E head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qad_dist.asr.attention import Segments
from qad_dist.asr.audio_tower import encode
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """A micro-batch behind embeddings and audio tower: the input of either stack."""

    hidden_ND: Tensor
    cos_1NE: Tensor
    sin_1NE: Tensor
    segments: Segments
    rows_R: Tensor


class DecoderStack(nn.Module):
    """The decoder's layers alone, called on one packed row: the module that the training engine owns.

    Rotary angles come from outside, so that they are computed once for teacher and student; embeddings, final norm and
    LM head stay outside, so that nothing frozen is ever sharded.
    """

    def __init__(self, layers: nn.ModuleList, *, keeps_all: bool = False) -> None:
        """Take the layers.

        Args:
            layers: Of a decoder.
            keeps_all: Whether the states behind all of them are wanted, not only those behind the last.
        """
        super().__init__()
        self.layers, self.keeps_all = layers, keeps_all

    def forward(self, hidden_ND: Tensor, cos_1NE: Tensor, sin_1NE: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        """Run all layers; returns ``[N, D]`` behind each, or behind the last alone, before the final norm."""
        # A copy, not a view: a compiled layer looks at what a view is of, and the first one would need its own graph.
        hidden_1ND = torch.stack([hidden_ND])
        is_compiled = getattr(self.layers[0], "_compiled_call_impl", None) is not None
        if is_compiled:
            _mark_lengths(*_lengths_of(cos_1NE, sin_1NE, segments))
        states: list[Tensor] = []
        for layer in self.layers:
            if is_compiled:
                _mark_lengths((hidden_1ND, [1]))  # an output carries no mark
            hidden_1ND = layer(
                hidden_1ND, position_embeddings=(cos_1NE, sin_1NE), attention_mask=None, segments=segments
            )
            if self.keeps_all or layer is self.layers[-1]:
                states.append(hidden_1ND.squeeze(0))
        return tuple(states)


def compile_layers(*stacks: nn.ModuleList) -> None:
    """Compile each layer in place: names of modules and weights stay, and all layers that play one part share a graph.

    One graph each for a teacher's layers, a student's first one (its input needs no gradient) and its others; as many
    again where gradients are off. Batches of any number of tokens and utterances go through them.
    """
    import torch._dynamo  # takes seconds

    # Teacher and student share their code, and with it this limit, 8 by default.
    torch._dynamo.config.recompile_limit = 16
    for layers in stacks:
        for layer in layers:
            layer.compile(fullgraph=True)


def _lengths_of(cos_1NE: Tensor, sin_1NE: Tensor, segments: Segments) -> list[tuple[Tensor, list[int]]]:
    """What all layers are given alike, and which of its sizes differ from batch to batch."""
    return [
        *((cos_1NE, [1]), (sin_1NE, [1]), (segments.scatter_T, [0])),
        *((group.gather_GL, [0, 1]) for group in segments.groups),
        *((group.mask_G1LL, [0, 2, 3]) for group in segments.groups),
    ]


def _mark_lengths(*tensors: tuple[Tensor, list[int]]) -> None:
    """Tell the compiler of sizes that differ from batch to batch."""
    from torch._dynamo import maybe_mark_dynamic  # takes seconds to import

    for tensor, sizes in tensors:
        maybe_mark_dynamic(tensor, sizes)


def run_layer(layer: nn.Module, hidden_ND: Tensor, cos_1NE: Tensor, sin_1NE: Tensor, segments: Segments) -> Tensor:
    """One decoder layer on a packed row: ``[N, D]`` to ``[N, D]``."""
    hidden_1ND = layer(
        hidden_ND.unsqueeze(0), position_embeddings=(cos_1NE, sin_1NE), attention_mask=None, segments=segments
    )
    return hidden_1ND.squeeze(0)


@torch.no_grad()
def embed(model: AsrModel, batch: Batch) -> EmbeddedBatch:
    """Token embeddings with the audio tower's output in place, and the rotary angles.

    Args:
        model: Either model: these parts are shared.
        batch: On the model's device.
    """
    decoder = model.decoder
    audio_PD = encode(model.audio_tower, batch.mel_MF, batch.mel_lengths_U, audio_attention=model.audio_attention)
    hidden_ND = decoder.embed_tokens(batch.input_ids_N)
    hidden_ND = hidden_ND.index_copy(0, batch.audio_positions_P, audio_PD)
    cos_1NE, sin_1NE = decoder.rotary_emb(hidden_ND, batch.position_ids_N[None])
    segments = Segments.from_lengths(batch.cu_seqlens_U1.diff().long(), causal=True, device=hidden_ND.device)
    return EmbeddedBatch(hidden_ND, cos_1NE, sin_1NE, segments, batch.rows_R)


def response_states(stack: Any, embedded: EmbeddedBatch, norm: nn.Module) -> Tensor:
    """Final hidden states at the response rows: ``[R, D]``, what the LM head reads.

    Args:
        stack: A :class:`DecoderStack`, or a training engine around one.
        embedded: From :func:`embed`.
        norm: The shared final norm.
    """
    return norm(layer_states(stack, embedded)[-1].index_select(0, embedded.rows_R))


def layer_states(stack: Any, embedded: EmbeddedBatch) -> tuple[Tensor, ...]:
    """What :meth:`DecoderStack.forward` returns; arguments as of :func:`response_states`."""
    return stack(embedded.hidden_ND, embedded.cos_1NE, embedded.sin_1NE, embedded.segments)
