"""Slots: where utterances are decoded side by side, each in its own, and the one step that all of them take together.

A slot holds the keys and values of one utterance's prompt and response, and what was chosen so far. All memory is taken
once; no shape in a step depends on how far the utterances have come, and nothing in it asks the device for a value. So
the host may run ahead, a GPU can replay the step as a graph, and what has ended is looked at between steps.

The response to P prompt tokens stands at positions P, P + 1, ... of its slot. A step feeds the token at the slot's
position and puts the one that it chooses behind it. A slot whose utterance has ended stands still: it takes part in the
step, and what it puts behind the response is not read.

Dimension key: S slots, L positions of a slot, U prompts, N their packed tokens, C cells of all slots (S x L),
H query heads, K key-value heads, E head width, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qad_dist.asr.decoder import embed
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.head import FrozenHead

RUNNING = -1
"""Stands in :meth:`Slots.last_positions` for an utterance that goes on."""


@dataclass(frozen=True, slots=True)
class Response:
    """What was chosen in a slot."""

    token_ids: list[int]
    logprobs: list[float]
    hidden_RD: Tensor | None
    """On the host, if it is kept."""


class Slots:
    """Memory for utterances that are decoded together, and the decoder that runs over it."""

    def __init__(self, model: AsrModel, *, num_slots: int, max_length: int, keep_hidden: bool) -> None:
        """Take the memory.

        Args:
            model: Teacher or student.
            num_slots: Utterances that are decoded at once.
            max_length: Most tokens of a prompt and its response.
            keep_hidden: Whether the hidden states that tokens were chosen from are kept.
        """
        decoder, device = model.decoder, model.device
        attention = decoder.layers[0].self_attn
        num_heads = attention.k_proj.out_features // attention.head_dim
        _, width = decoder.embed_tokens.weight.shape
        dtype = decoder.embed_tokens.weight.dtype
        length = max_length + 1  # for what a slot that stands still puts behind its response
        shape = (len(decoder.layers), num_slots, num_heads, length, attention.head_dim)
        self._model, self._decoder, self._head = model, decoder, FrozenHead(model.head_weight_VD)
        # Zeros: what is masked is multiplied by 0 nevertheless, and anything may lie in memory that is just taken.
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._tokens_C = torch.zeros(num_slots * length, dtype=torch.int64, device=device)
        self._logprobs_C = torch.zeros(num_slots * length, device=device)
        self._hidden_CD = torch.zeros(num_slots * length * keep_hidden, width, dtype=dtype, device=device)
        self._positions_S, self._stops_S = (torch.zeros_like(self._tokens_C[:num_slots]) for _ in range(2))
        self._is_running_S = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._first_cells_S = length * torch.arange(num_slots, device=device)
        self._first_rows_SK = length * torch.arange(num_slots * num_heads, device=device).view(num_slots, num_heads)
        self._within_L = torch.arange(length, device=device)
        cos_1LE, sin_1LE = decoder.rotary_emb(self._keys, self._within_L[None])
        lower_LE, upper_LE = sin_1LE[0].chunk(2, dim=-1)
        self._cos_LE, self._turn_LE = cos_1LE[0], torch.cat([-lower_LE, upper_LE], dim=-1)
        self._keep_hidden, self._length = keep_hidden, length

    def start(self, slots: Sequence[int], prompts: Batch, stops: Sequence[int]) -> None:
        """Run prompts through the model, packed, and choose the first token of each response.

        Args:
            slots: A free one for each prompt.
            prompts: On the host; without responses.
            stops: The last position that each response may reach.
        """
        device = self._model.device
        lengths_U = prompts.cu_seqlens_U1.diff().long()
        slots_U = torch.tensor(slots)
        slots_N = slots_U.repeat_interleave(lengths_U).to(device)
        slots_U, last_U, ends_U = (each.to(device) for each in (slots_U, lengths_U - 1, prompts.cu_seqlens_U1[1:] - 1))
        stops_U = torch.tensor(stops).to(device)
        embedded = embed(self._model, prompts.to(device))
        rows_KN = (self._first_rows_SK[slots_N] + prompts.position_ids_N.to(device)[:, None]).T
        cache = _PromptCache(self, rows_KN.flatten())
        hidden_1ND = embedded.hidden_ND.unsqueeze(0)
        for layer in self._decoder.layers:
            hidden_1ND = layer(
                hidden_1ND,
                position_embeddings=(embedded.cos_1NE, embedded.sin_1NE),
                attention_mask=None,
                past_key_values=cache,
                segments=embedded.segments,
            )
        tokens_U = self._choose(hidden_1ND[0].index_select(0, ends_U), self._first_cells_S[slots_U] + last_U + 1)
        self._positions_S[slots_U] = last_U + 1
        self._stops_S[slots_U] = stops_U
        self._is_running_S[slots_U] = (tokens_U != self._model.prompt.end_id) & (last_U + 1 < stops_U)

    def step(self, num_slots: int, length: int) -> None:
        """Choose the next token of every utterance that goes on.

        Args:
            num_slots: So many slots take part, from the first.
            length: What they attend to: so many positions, more than any of them has reached.
        """
        positions_S, is_running_S = self._positions_S[:num_slots], self._is_running_S[:num_slots]
        cells_S = self._first_cells_S[:num_slots] + positions_S
        rows = (self._first_rows_SK[:num_slots] + positions_S[:, None]).flatten()
        hidden_SD = self._decoder.embed_tokens(self._tokens_C.index_select(0, cells_S))
        angles = tuple(each_LE.index_select(0, positions_S)[:, None] for each_LE in (self._cos_LE, self._turn_LE))
        is_ahead_SL = self._within_L[:length] > positions_S[:, None]
        mask_S11L = hidden_SD.new_zeros(is_ahead_SL.shape).masked_fill_(is_ahead_SL, -torch.inf)[:, None, None]
        for number, layer in enumerate(self._decoder.layers):
            attended_SD = self._attend(number, layer, hidden_SD, angles, rows, mask_S11L)
            hidden_SD = hidden_SD + attended_SD
            hidden_SD = hidden_SD + layer.mlp(layer.post_attention_layernorm(hidden_SD))
        tokens_S = self._choose(hidden_SD, cells_S + 1)
        positions_S.add_(is_running_S)
        is_running_S.logical_and_(tokens_S != self._model.prompt.end_id)
        is_running_S.logical_and_(positions_S < self._stops_S[:num_slots])

    def last_positions(self, num_slots: int) -> list[int]:
        """The position of each response's last token, or :data:`RUNNING`. Waits for the device."""
        return self._positions_S.masked_fill(self._is_running_S, RUNNING)[:num_slots].tolist()

    def responses(self, slots: Sequence[int], spans: Sequence[range]) -> list[Response]:
        """What stands in these slots at these positions. Waits for the device."""
        slots_U = torch.tensor(slots, device=self._tokens_C.device)
        tokens, logprobs = (
            cells_C.view(-1, self._length).index_select(0, slots_U).tolist()
            for cells_C in (self._tokens_C, self._logprobs_C)
        )
        return [
            Response(tokens[i][span.start : span.stop], logprobs[i][span.start : span.stop], self._hidden(slot, span))
            for i, (slot, span) in enumerate(zip(slots, spans, strict=True))
        ]

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Take utterances, which have not reached position ``length``, to other slots."""
        sources_U, targets_U = (torch.tensor(slots, device=self._tokens_C.device) for slots in (sources, targets))
        for states in (self._keys[:, :, :, :length], self._values[:, :, :, :length]):
            states.index_copy_(1, targets_U, states.index_select(1, sources_U))
        of_slots = (self._positions_S, self._stops_S, self._is_running_S)
        of_cells = (self._tokens_C, self._logprobs_C, self._hidden_CD)
        for states in (*of_slots, *(cells.unflatten(0, (-1, self._length)) for cells in of_cells if len(cells))):
            states.index_copy_(0, targets_U, states.index_select(0, sources_U))

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values (``[rows, E]``) into a layer's memory; a row is a position of a head of a slot."""
        self._keys[layer].view(-1, keys.shape[-1]).index_copy_(0, rows, keys)
        self._values[layer].view(-1, keys.shape[-1]).index_copy_(0, rows, values)

    def _hidden(self, slot: int, span: range) -> Tensor | None:
        if not self._keep_hidden:
            return None
        first = slot * self._length
        # A copy also on the host: the next utterance of the slot writes over it.
        return self._hidden_CD[first + span.start : first + span.stop].to("cpu", copy=True)

    def _attend(
        self, number: int, layer: Any, hidden_SD: Tensor, angles: tuple[Tensor, ...], rows: Tensor, mask_S11L: Tensor
    ) -> Tensor:
        """The attention of a layer: what its own ``forward`` computes, for one token of each slot."""
        attention, num_slots, length = layer.self_attn, len(hidden_SD), mask_S11L.shape[-1]
        heads = (num_slots, -1, attention.head_dim)
        states_SD = layer.input_layernorm(hidden_SD)
        query_SHE = attention.q_norm(attention.q_proj(states_SD).view(heads))
        key_SKE = attention.k_norm(attention.k_proj(states_SD).view(heads))
        value_SKE = attention.v_proj(states_SD).view(heads)
        both = torch.cat([query_SHE, key_SKE], dim=1)
        cos_S1E, turn_S1E = angles
        both = both * cos_S1E + both.roll(attention.head_dim // 2, dims=-1) * turn_S1E
        query_SHE, key_SKE = both.split([query_SHE.shape[1], key_SKE.shape[1]], dim=1)
        self.write(number, rows, key_SKE.reshape(-1, attention.head_dim), value_SKE.flatten(0, 1))
        # The query heads of a key-value head are its rows: one token of a slot has no others, and nothing is repeated.
        attended = F.scaled_dot_product_attention(
            query_SHE.unflatten(1, (key_SKE.shape[1], -1)),
            self._keys[number, :num_slots, :, :length],
            self._values[number, :num_slots, :, :length],
            attn_mask=mask_S11L,
            scale=attention.scaling,
        )
        return attention.o_proj(attended.reshape(num_slots, -1))

    def _choose(self, hidden_UD: Tensor, cells_U: Tensor) -> Tensor:
        """The likeliest next tokens, which are put into these cells."""
        hidden_UD = self._decoder.norm(hidden_UD)
        logits_UV = self._head(hidden_UD)
        best_U, tokens_U = logits_UV.max(-1)
        self._tokens_C.index_copy_(0, cells_U, tokens_U)
        self._logprobs_C.index_copy_(0, cells_U, logits_UV.sub_(best_U[:, None]).exp_().sum(-1).log_().neg_())
        if self._keep_hidden:
            self._hidden_CD.index_copy_(0, cells_U, hidden_UD)
        return tokens_U


class _PromptCache:
    """Stands where a layer expects transformers' cache: prompts attend to what they bring, which is also kept."""

    def __init__(self, slots: Slots, rows: Tensor) -> None:
        self._slots, self._rows = slots, rows

    def update(self, key_1KNE: Tensor, value_1KNE: Tensor, layer: int, _: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values; both are given back."""
        self._slots.write(layer, self._rows, key_1KNE.flatten(0, 2), value_1KNE.flatten(0, 2))
        return key_1KNE, value_1KNE


class StepGraphs:
    """Steps of all slots on a GPU, replayed as CUDA graphs, one for each length that is attended to.

    The first step of a length runs as it is, which also makes the libraries take the memory that they keep; the second
    is captured. Graphs share their memory: nothing that a step leaves behind lies in it.
    """

    def __init__(self, slots: Slots) -> None:
        """Capture nothing yet."""
        self._slots = slots
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, num_slots: int, length: int) -> None:
        """As :meth:`Slots.step`."""
        key = (num_slots, length)
        if key not in self._graphs:
            self._graphs[key] = None
            self._slots.step(num_slots, length)
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            # What other threads do on the GPU meanwhile, such as reading ahead, is no part of the graph.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._slots.step(num_slots, length)
        graph.replay()
