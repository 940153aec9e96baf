"""What quantizing each Linear alone costs: the error of its output, and the KL of the whole decoder to the teacher.

With one Linear quantized nothing before its layer changes, so all Linears of a layer start from the same hidden states,
and each costs the layers from its own on.

Dimension key: N packed tokens, D width, O outputs, C input channels.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qad_dist.quant.calibrate import GroupKey, SmoothedGroup
from qad_dist.quant.fold import fold_groups
from qad_dist.quant.high_precision import LinearSwitch
from qad_dist.quant.state import enabled_quantizers
from qad_dist.quant.walk import WalkBatch, final_hidden
from qad_dist.runtime.collectives import all_gather_objects
from shards.errors import ModelError

log = logging.getLogger(__name__)

OUTLIER_FACTOR = 10.0
"""An input channel is an outlier if its amax is more than this many times that of the median channel."""
NUM_WORST = 5
"""Linears that are named as the worst."""

KlOfBatch = Callable[[WalkBatch, Tensor], tuple[float, int]]
"""From a batch and ``[N, D]`` behind the last layer: KL to the teacher in nats, summed over response tokens, and their
number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSensitivity:
    """What is known of one Linear of the decoder."""

    name: str
    """``layers.3.mlp.down_proj``."""
    group: str
    """The fold group that it belongs to."""
    sqnr_db: float | None
    """Power of its output over that of the error, where it alone is quantized; None if it is not, or has no error."""
    kl_per_token: float | None
    """To the teacher in nats, where it alone is quantized; None if it is not."""
    input_amax_before: float
    """Largest magnitude of its input over the calibration set, before smoothing."""
    input_amax_after: float
    """The same behind it; that of the whole group."""
    outlier_share: float
    """Share of its input channels that are outliers before smoothing."""
    is_kept: bool
    """Whether it stays in high precision."""


@torch.no_grad()
def measure_sensitivity(
    layers: nn.ModuleList,
    batches: Sequence[WalkBatch],
    *,
    kl: KlOfBatch,
    smoothed: Mapping[GroupKey, SmoothedGroup],
    exact: Mapping[str, Tensor],
) -> list[LinearSensitivity]:
    """Quantize one Linear after the other, alone; all are quantized again afterwards.

    Args:
        layers: Of the finished student.
        batches: Held out, this rank's share; ``start_ND`` in the dtype of the model. Nothing in them changes.
        kl: Against the real teacher.
        smoothed: What calibration chose for each fold group.
        exact: As :class:`~qad_dist.quant.high_precision.LinearSwitch` takes it.

    Returns:
        One for each Linear, in their order; the same on every rank and for any number of ranks.

    Raises:
        ModelError: There is no response token on any rank; on every rank.
    """
    switch = LinearSwitch(layers, exact=exact)
    is_quantized = {name: next(enabled_quantizers(linear), None) is not None for name, linear in switch.linears.items()}
    members = _members(layers)
    sums: list[_Sums] = []
    switch.switch_all(on=False)
    try:
        hidden = [batch.start_ND for batch in batches]
        for number, layer in enumerate(layers):
            for name in (name for name, (owner, _) in members.items() if owner == number and is_quantized[name]):
                switch.switch(name, on=True)
                exact_OC = switch.weight(name)
                for batch, hidden_ND in zip(batches, hidden, strict=True):
                    with _output_error(switch.linears[name], exact_OC) as error:
                        last_ND = final_hidden(batch, layers[number:], from_ND=hidden_ND)
                    sums.append(_Sums(name, batch.number, *error, *kl(batch, last_ND)))
                switch.switch(name, on=False)
            hidden = [batch.run_layer(layer, hidden_ND) for batch, hidden_ND in zip(batches, hidden, strict=True)]
            log.info("event=sensitivity layers=%d of=%d", number + 1, len(layers))
    finally:
        switch.switch_all(on=True)
    totals = _totals(sums, expects_rows=any(is_quantized.values()))
    return [_record(name, key, smoothed[key], totals.get(name)) for name, key in members.items()]


def groups_by_kl(records: Iterable[LinearSensitivity]) -> list[list[str]]:
    """Linears that servers run as one, those of the largest KL first, added up; without those that are kept."""
    groups: dict[tuple[str, str], list[LinearSensitivity]] = {}
    for record in records:
        if record.kl_per_token is not None and not record.is_kept:
            groups.setdefault((record.name.split(".")[1], record.group), []).append(record)
    ranked = sorted(groups.values(), key=lambda group: -sum(record.kl_per_token or 0.0 for record in group))
    return [[record.name for record in group] for group in ranked]


def as_json(
    records: Sequence[LinearSensitivity],
    *,
    kept: Sequence[str] = (),
    kl_per_token: float | None = None,
    kl_unquantized: float | None = None,
) -> dict[str, Any]:
    """What ``sensitivity.json`` holds.

    Args:
        records: Of all Linears.
        kept: Names of Linears that were put in high precision because of these figures.
        kl_per_token: Of the whole student on the same batches, nats.
        kl_unquantized: Of the student with no Linear quantized: what the dtype alone costs.
    """
    told = [replace(record, is_kept=record.is_kept or record.name in kept) for record in records]
    measured = [record for record in told if record.kl_per_token is not None]
    worst = sorted(measured, key=lambda record: -(record.kl_per_token or 0.0))[:NUM_WORST]
    return {
        "kl_per_token": kl_per_token,
        "kl_unquantized": kl_unquantized,
        "linears": [asdict(record) for record in told],
        "worst": [record.name for record in worst],
        "kept": [record.name for record in told if record.is_kept],
    }


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one Linear over one batch."""

    name: str
    number: int
    signal: float
    noise: float
    kl: float
    rows: int


def _members(layers: nn.ModuleList) -> dict[str, GroupKey]:
    """To which fold group each Linear belongs, in the order in which the decoder computes them."""
    return {
        f"layers.{number}.{name}": (number, group.name)
        for number, layer in enumerate(layers)
        for group in fold_groups(layer)
        for name in group.consumers
    }


@contextmanager
def _output_error(linear: Any, weight_OC: Tensor) -> Iterator[list[float]]:
    """Filled with ``sum y^2`` and ``sum (y - yq)^2`` while a Linear runs once; y is its output without quantization."""
    sums: list[float] = []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        exact = F.linear(arguments[0], weight_OC, linear.bias).double()
        sums.extend((float(exact.square().sum()), float((exact - output.double()).square().sum())))

    handle = linear.register_forward_hook(hook)
    try:
        yield sums
    finally:
        handle.remove()


def _totals(sums: Sequence[_Sums], *, expects_rows: bool) -> dict[str, tuple[float, float, float]]:
    """Signal, noise and KL per token of each Linear."""
    # In plan order, whichever rank had them: floating-point sums depend on their order.
    ordered = sorted((one for share in all_gather_objects(sums) for one in share), key=lambda one: one.number)
    rows: Counter[str] = Counter()
    totals: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in ordered:
        rows[one.name] += one.rows
        for place, value in enumerate((one.signal, one.noise, one.kl)):
            totals[one.name][place] += value
    if expects_rows and not rows.total():
        error = ModelError(
            "quantize.sensitivity_utterances must be readable and have responses, got none that is; "
            "verify the shards, or set it to 0"
        )
        error.is_shared = True  # every rank has the sums of all
        raise error
    return {name: (signal, noise, kl / rows[name]) for name, (signal, noise, kl) in totals.items()}


def _record(
    name: str, key: GroupKey, smoothed: SmoothedGroup, total: tuple[float, float, float] | None
) -> LinearSensitivity:
    before_C = smoothed.amax_C
    signal, noise, kl = total or (0.0, 0.0, None)
    return LinearSensitivity(
        name=name,
        group=key[1],
        sqnr_db=10 * math.log10(signal / noise) if signal and noise else None,
        kl_per_token=kl,
        input_amax_before=float(before_C.amax()),
        input_amax_after=float((before_C / smoothed.choice.scale_C.cpu()).amax()),
        outlier_share=float((before_C > OUTLIER_FACTOR * before_C.median()).float().mean()),
        is_kept=total is None,
    )
