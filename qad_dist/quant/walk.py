"""The calibration set on its way through the decoder, one layer at a time, and what the layers read.

All of a rank's batches pass a layer before any passes the next one: so a layer's inputs are known when its scales are
chosen, and no batch runs through the decoder twice. What is remembered of the inputs is a maximum for each channel and
a sample of tokens, equal on every rank whatever their number: maxima do not depend on order, and the sampled tokens are
those that batch and position say, gathered in the order of the batches.

Dimension key: N packed tokens, D width, R response rows, C channels of an input, S sampled tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qad_dist.quant.fold import FoldGroup
from qad_dist.runtime.collectives import all_gather_objects

RESPONSE_WEIGHT = 11.0
"""What an error at a token whose successor is a response token counts, beside 1 at any other. Measured: KL of 4-bit
weights on unseen speakers, with 1, 4 and 11: 0.032, 0.024 and 0.021 nats."""


@dataclass(slots=True, kw_only=True)
class WalkBatch:
    """One batch and how far it is."""

    number: int
    """Place in the plan, from which all that depends on order is taken."""
    is_search: bool
    """Of the part on which choices are compared; the rest is what weights are corrected with."""
    start_ND: Tensor
    """Input of the first layer, in the dtype of the layers."""
    rows_R: Tensor
    """int64: tokens whose successor is a response token."""
    run_layer: Callable[[nn.Module, Tensor], Tensor]
    """Runs one layer of the decoder: ``[N, D]`` to ``[N, D]``."""
    hidden_ND: Tensor
    """What the next layer reads, of the teacher."""
    drifted_ND: Tensor
    """The same behind layers that are quantized already; the teacher's where nothing asks for it."""


@torch.no_grad()
def final_hidden(batch: WalkBatch, layers: Iterable[nn.Module], *, from_ND: Tensor | None = None) -> Tensor:
    """``[N, D]`` behind some layers, from the batch's start or from what the first of them reads."""
    hidden_ND = batch.start_ND if from_ND is None else from_ND
    for layer in layers:
        hidden_ND = batch.run_layer(layer, hidden_ND)
    return hidden_ND


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sampled inputs of a group of Linears."""

    inputs_SC: Tensor
    """float32."""
    weights_S: Tensor
    """float32: what an error at the token counts."""


@dataclass(frozen=True, slots=True)
class Maxima:
    """Largest magnitudes of a group's input channels, over all ranks."""

    of_all_C: Tensor
    """float32, over the whole calibration set."""
    of_rest_C: Tensor
    """Without the search part: what choices must be compared with, since speech that nobody has calibrated on exceeds
    the maxima as that part exceeds these. Of the whole set where there is no rest."""


class Walk:
    """A decoder's calibration: holds this rank's batches and moves them on, layer by layer."""

    def __init__(self, batches: Sequence[WalkBatch], *, num_rows: int, is_corrected: bool) -> None:
        """Take the batches.

        Args:
            batches: This rank's, in the order of the plan; at least one over all ranks is of the search part.
            num_rows: Most tokens of each part to remember, over all ranks.
            is_corrected: Whether weights will be corrected: then the rest is remembered as well.
        """
        self.batches = list(batches)
        self._parts = (True, False) if is_corrected else (True,)
        self._kept = _rows_to_keep(self.batches, num_rows=num_rows)
        self.device = self.batches[0].start_ND.device

    @torch.no_grad()
    def pass_layer(
        self, layer: nn.Module, groups: Sequence[FoldGroup]
    ) -> tuple[dict[str, Maxima], dict[str, dict[bool, Tokens]]]:
        """Run a layer on the teacher's hidden states, which then stand before the next one.

        Returns:
            For each group the largest magnitude of each channel, and its sampled tokens of the search part (True) and
            the rest (False; missing where there is none).
        """
        maxima: dict[tuple[bool, str], Tensor] = {}
        samples: list[_Sample] = []
        for batch in self.batches:
            with _inputs_of(groups) as inputs:
                batch.hidden_ND = batch.run_layer(layer, batch.hidden_ND)
            for name, inputs_NC in inputs.items():
                key, amax_C = (batch.is_search, name), inputs_NC.abs().amax(0)
                maxima[key] = torch.maximum(maxima[key], amax_C) if key in maxima else amax_C
            if batch.is_search in self._parts:
                samples.append(self._sample(batch, inputs))
        return self._reduced(maxima, groups), self._gathered(samples, groups)

    @torch.no_grad()
    def look_at_drifted(self, layer: nn.Module, group: FoldGroup) -> dict[bool, Tokens]:
        """What a group reads behind everything that is quantized before it; nothing moves on."""
        samples = []
        for batch in self.batches:
            with _inputs_of([group]) as inputs:
                batch.run_layer(layer, batch.drifted_ND)
            samples.append(self._sample(batch, inputs))
        return self._gathered(samples, [group])[group.name]

    @torch.no_grad()
    def pass_drifted(self, layer: nn.Module) -> None:
        """Run a quantized layer on the drifted hidden states, which then stand before the next one."""
        for batch in self.batches:
            batch.drifted_ND = batch.run_layer(layer, batch.drifted_ND)

    def to_start(self) -> None:
        """Put all batches back in front of the first layer."""
        for batch in self.batches:
            batch.hidden_ND = batch.drifted_ND = batch.start_ND

    @torch.no_grad()
    def final_states(self, layers: Iterable[nn.Module]) -> list[tuple[WalkBatch, Tensor]]:
        """The search part from its start through all layers, as they are now: ``[N, D]`` of each batch."""
        layers, outcome = list(layers), []
        for batch in self.batches:
            if batch.is_search:
                outcome.append((batch, final_hidden(batch, layers)))
        return outcome

    def _sample(self, batch: WalkBatch, inputs: Mapping[str, Tensor]) -> "_Sample":
        rows_S = self._kept[batch.number]
        is_response_N = torch.zeros(len(batch.start_ND), dtype=torch.bool, device=self.device)
        is_response_N[batch.rows_R] = True
        weights_S = torch.where(is_response_N[rows_S], RESPONSE_WEIGHT, 1.0).cpu()
        found = {name: inputs_NC.index_select(0, rows_S).cpu() for name, inputs_NC in inputs.items()}
        return _Sample(batch.number, batch.is_search, found, weights_S)

    def _reduced(self, maxima: Mapping[tuple[bool, str], Tensor], groups: Sequence[FoldGroup]) -> dict[str, Maxima]:
        everywhere = all_gather_objects({key: amax_C.cpu() for key, amax_C in maxima.items()})
        reduced = {}
        for group in groups:
            parts = {
                part: torch.stack([share[part, group.name] for share in everywhere if (part, group.name) in share])
                for part in (True, False)
                if any((part, group.name) in share for share in everywhere)
            }
            of_all_C = torch.cat(list(parts.values())).amax(0)
            of_rest_C = parts[False].amax(0) if False in parts else of_all_C
            reduced[group.name] = Maxima(of_all_C.to(self.device), of_rest_C.to(self.device))
        return reduced

    def _gathered(self, samples: "Sequence[_Sample]", groups: Sequence[FoldGroup]) -> dict[str, dict[bool, Tokens]]:
        """In the order of the batches, whichever rank had them."""
        # Where batches are fewer than ranks, a rank repeats another's.
        by_number = {sample.number: sample for share in all_gather_objects(samples) for sample in share}
        everywhere = [by_number[number] for number in sorted(by_number)]
        found: dict[str, dict[bool, Tokens]] = {group.name: {} for group in groups}
        for part in self._parts:
            ordered = [sample for sample in everywhere if sample.is_search is part]
            for group in groups if ordered else ():
                inputs_SC = torch.cat([sample.inputs[group.name] for sample in ordered]).to(self.device)
                weights_S = torch.cat([sample.weights_S for sample in ordered]).to(self.device)
                found[group.name][part] = Tokens(inputs_SC, weights_S)
        return found


@dataclass(frozen=True, slots=True)
class _Sample:
    number: int
    is_search: bool
    inputs: dict[str, Tensor]
    weights_S: Tensor


def _rows_to_keep(batches: Sequence[WalkBatch], *, num_rows: int) -> dict[int, Tensor]:
    """Tokens to remember of each batch of this rank: as large a share of each, at equal distances."""
    own = {batch.number: (batch.is_search, len(batch.start_ND)) for batch in batches}
    lengths = {number: entry for share in all_gather_objects(own) for number, entry in share.items()}.values()
    totals = {part: sum(length for is_search, length in lengths if is_search is part) for part in (True, False)}
    kept = {}
    for batch in batches:
        length = len(batch.start_ND)
        wanted = max(1, round(length * min(1.0, num_rows / totals[batch.is_search])))
        kept[batch.number] = torch.linspace(0, length - 1, wanted).round().long().to(batch.start_ND.device)
    return kept


@contextmanager
def _inputs_of(groups: Sequence[FoldGroup]) -> Iterator[dict[str, Tensor]]:
    """Filled with what each group reads, ``[N, C]``, while the layer runs."""
    inputs: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].flatten(0, -2)

        return hook

    first = {group.name: next(iter(group.consumers.values())) for group in groups}
    hooks = [linear.register_forward_pre_hook(look(name)) for name, linear in first.items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
