"""As few Linears in high precision as a bound on the KL asks for: ``quantize.keep_high_precision: auto``.

Dimension key: O outputs, C input channels of a Linear.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qad_dist.linears import LINEARS
from qad_dist.quant.state import switch_quantizers
from shards.errors import ModelError

log = logging.getLogger(__name__)


class LinearSwitch:
    """Lets the Linears of a finished student quantize or not, one by one and reversibly.

    Weights of few bits stand on their grid when calibration is done, and no quantizer knows what they were before;
    ``exact`` holds those.
    """

    def __init__(self, layers: nn.ModuleList, *, exact: Mapping[str, Tensor]) -> None:
        """Change nothing yet.

        Args:
            layers: Of the decoder, with their quantizers.
            exact: ``[O, C]``, smoothed and folded but not rounded, by the names of the Linears; empty where quantizers
                alone round.
        """
        self.linears: dict[str, Any] = {
            f"layers.{number}.{name}": layer.get_submodule(name)
            for number, layer in enumerate(layers)
            for name in LINEARS
        }
        """By their names below the decoder, in the order in which it computes them."""
        self._exact_OC = exact
        self._rounded_OC = {name: self.linears[name].weight.data for name in self._exact_OC}

    def switch(self, name: str, *, on: bool) -> None:
        """Let a Linear compute as quantized, or in high precision. One that is kept for good stays as it is."""
        linear = self.linears[name]
        switch_quantizers(linear, on=on)
        if name in self._exact_OC:
            rounded_OC = self._rounded_OC[name]
            linear.weight.data = rounded_OC if on else self._exact_OC[name].to(rounded_OC)

    def weight(self, name: str) -> Tensor:
        """``[O, C]``: what the Linear multiplies by in high precision."""
        weight_OC = self.linears[name].weight
        return self._exact_OC[name].to(weight_OC) if name in self._exact_OC else weight_OC

    def switch_all(self, *, on: bool) -> None:
        """The same for all Linears."""
        for name in self.linears:
            self.switch(name, on=on)


def keep_fewest(
    layers: nn.ModuleList,
    ranked: Sequence[Sequence[str]],
    *,
    evaluate: Callable[[], float],
    budget: float,
    exact: Mapping[str, Tensor],
) -> list[str]:
    """The fewest of the worst Linears without whose quantization the student's KL is within a budget.

    Bisection over how many groups are kept, the worst first, as if the KL fell with their number; whether it does or
    not, what is returned was measured to be within. Only looks: all quantizers are on again afterwards.

    Args:
        layers: Of the decoder, finished.
        ranked: Groups of Linears that servers run as one, worst first; all that are quantized.
        evaluate: KL in nats per response token of the student as it is then; equal on all ranks.
        budget: Largest KL to accept, nats per token.
        exact: As :class:`LinearSwitch` takes it.

    Returns:
        Names of Linears, group by group; empty where the budget is met without.

    Raises:
        ModelError: The KL is above the budget even where nothing is quantized; on every rank.
    """
    switch = LinearSwitch(layers, exact=exact)

    def kl_with(num_kept: int) -> float:
        for place, names in enumerate(ranked):
            for name in names:
                switch.switch(name, on=place >= num_kept)
        kl = evaluate()
        log.info("event=kept groups=%d kl=%.6g budget=%g", num_kept, kl, budget)
        return kl

    try:
        if kl_with(0) <= budget:
            return []
        too_few, enough = 0, len(ranked)
        if (kl := kl_with(enough)) > budget:
            raise _unreachable(budget, kl)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if kl_with(middle) <= budget:
                enough = middle
            else:
                too_few = middle
        return [name for names in ranked[:enough] for name in names]
    finally:
        switch.switch_all(on=True)


def _unreachable(budget: float, kl: float) -> ModelError:
    error = ModelError(
        f"quantize.kl_budget must be at least the KL of the student with all Linears in high precision, got {budget:g} "
        f"below {kl:.3g} nats per token; raise it, or compute in a finer model.dtype"
    )
    error.is_shared = True  # the KL is equal on all ranks
    return error
