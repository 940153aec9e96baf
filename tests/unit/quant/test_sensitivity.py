"""Each Linear quantized alone: against whole forward passes with all other quantizers off."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.linears import LINEARS
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import Calibration, GroupKey, SmoothedGroup
from qad_dist.quant.high_precision import keep_fewest
from qad_dist.quant.search import Choice
from qad_dist.quant.sensitivity import LinearSensitivity, as_json, groups_by_kl, measure_sensitivity
from qad_dist.quant.state import enabled_quantizers, keep_in_high_precision
from qad_dist.quant.walk import WalkBatch
from shards.errors import ModelError
from tests.helpers.quantized import pack_with_own_responses, source_of
from tests.helpers.qwen import Samples

NAMES = [f"layers.{number}.{name}" for number in range(3) for name in LINEARS]
GROUP_OF = dict(zip(LINEARS, ["qkv"] * 3 + ["o"] + ["gate_up"] * 2 + ["down"], strict=True))


@dataclass(frozen=True)
class Finished:
    """A calibrated student, what it is measured on and with, and what was chosen for it."""

    student: AsrModel
    teacher: AsrModel
    batches: list[WalkBatch]
    smoothed: dict[GroupKey, SmoothedGroup]

    @property
    def layers(self) -> nn.ModuleList:
        return self.student.decoder.layers

    @torch.no_grad()
    def kl(self, batch: WalkBatch, hidden_ND: Tensor) -> tuple[float, int]:
        """In float64, with the teacher run anew."""
        teacher_ND = batch.start_ND
        for layer in self.teacher.decoder.layers:
            teacher_ND = batch.run_layer(layer, teacher_ND)
        log_student_RV, log_teacher_RV = (
            (self.teacher.decoder.norm(rows_ND[batch.rows_R]) @ self.teacher.head_weight_VD.T).double().log_softmax(-1)
            for rows_ND in (hidden_ND, teacher_ND)
        )
        kl_R = (log_teacher_RV.exp() * (log_teacher_RV - log_student_RV)).sum(-1)
        return float(kl_R.sum()), len(kl_R)

    def measure(self, exact: Mapping[str, Tensor] | None = None) -> dict[str, LinearSensitivity]:
        found = measure_sensitivity(self.layers, self.batches, kl=self.kl, smoothed=self.smoothed, exact=exact or {})
        return {record.name: record for record in found}

    def evaluate(self) -> float:
        """Of the student as it is."""
        sums = [self.kl(batch, self.final_states(batch)) for batch in self.batches]
        return sum(kl for kl, _ in sums) / sum(rows for _, rows in sums)

    @torch.no_grad()
    def final_states(self, batch: WalkBatch) -> Tensor:
        hidden_ND = batch.start_ND
        for layer in self.layers:
            hidden_ND = batch.run_layer(layer, hidden_ND)
        return hidden_ND


@pytest.fixture(scope="module")
def shared(nano: AsrModel, load_nano: Callable[..., AsrModel], clips: list[Samples], batches: list[Batch]) -> Finished:
    """In INT8. Nobody may change it."""
    student = load_nano()
    section = QuantizeConfig(alpha=0.5)
    smoothed = Calibration(student.model, student.decoder.layers, section, source_of(student, batches)).run(
        torch.float32
    )
    unseen = [pack_with_own_responses(nano, clips[start : start + 2]) for start in (12, 14, 16)]
    held_out = [walk_batch(nano, batch, number=i, is_search=True) for i, batch in enumerate(unseen)]
    return Finished(student, nano, held_out, smoothed)


@pytest.fixture(scope="module")
def measured(shared: Finished) -> dict[str, LinearSensitivity]:
    return shared.measure()


@pytest.fixture
def finished(shared: Finished) -> Finished:
    """The same, to change."""
    student = replace(shared.student, model=copy.deepcopy(shared.student.model))
    return replace(shared, student=student)


def linear_of(finished: Finished, name: str) -> Any:
    return finished.student.decoder.get_submodule(name)


def kl_with_quantizers_of(finished: Finished, names: Sequence[str]) -> float:
    """By whole forward passes, the quantizers of all others disabled as ModelOpt does."""
    found = dict(enabled_quantizers(finished.student.decoder))
    for name, quantizer in found.items():
        if name.rsplit(".", 1)[0] not in names:
            quantizer.disable()
    kl = finished.evaluate()
    for quantizer in found.values():
        quantizer.enable()
    return kl


def num_quantizing(finished: Finished) -> int:
    return sum(quantizer._if_quant for _, quantizer in enabled_quantizers(finished.layers))


def test_every_linear_is_measured_in_the_order_of_the_decoder(measured: dict[str, LinearSensitivity]) -> None:
    assert list(measured) == NAMES
    assert [record.group for record in measured.values()] == [GROUP_OF[name.split(".", 2)[2]] for name in NAMES]
    assert not any(record.is_kept for record in measured.values())


def test_kl_is_that_of_whole_passes_with_all_other_quantizers_disabled(
    finished: Finished, measured: dict[str, LinearSensitivity]
) -> None:
    expected = {name: kl_with_quantizers_of(finished, [name]) for name in NAMES}

    assert {name: record.kl_per_token for name, record in measured.items()} == expected
    assert min(expected.values()) > 1e-8


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.2.mlp.down_proj"])
def test_sqnr_is_that_of_the_output_on_the_real_input(
    finished: Finished, measured: dict[str, LinearSensitivity], name: str
) -> None:
    linear = linear_of(finished, name)
    weight_OC = linear.weight.numpy().astype(np.float64)
    amax, amax_O1 = (float(linear.input_quantizer.amax), linear.weight_quantizer.amax.numpy().astype(np.float64))
    inputs: list[Tensor] = []
    for _, quantizer in enabled_quantizers(finished.layers):
        quantizer.disable()
    linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].flatten(0, -2)))
    for batch in finished.batches:
        finished.final_states(batch)
    inputs_NC = torch.cat(inputs).numpy().astype(np.float64)

    # 8 bits, symmetric, to the nearest.
    rounded_NC = np.clip(np.rint(inputs_NC * 127 / amax), -128, 127) * amax / 127
    rounded_OC = np.clip(np.rint(weight_OC * 127 / amax_O1), -128, 127) * amax_O1 / 127
    exact_NO = inputs_NC @ weight_OC.T
    noise = np.square(rounded_NC @ rounded_OC.T - exact_NO).sum()
    expected = 10 * np.log10(np.square(exact_NO).sum() / noise)

    # A value that float32 rounds to the other code is off by a whole step.
    assert measured[name].sqnr_db == pytest.approx(expected, abs=0.01)


def test_linear_of_coarse_weights_is_named_worst(finished: Finished, measured: dict[str, LinearSensitivity]) -> None:
    coarse = "layers.1.self_attn.v_proj"
    assert coarse not in as_json(list(measured.values()))["worst"]
    linear_of(finished, coarse).weight_quantizer.num_bits = 3

    found = finished.measure()

    assert as_json(list(found.values()))["worst"][0] == coarse
    assert groups_by_kl(found.values())[0] == [f"layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert (found[coarse].sqnr_db or 0) < (measured[coarse].sqnr_db or 0) - 15
    assert {name: one for name, one in found.items() if name != coarse} == {
        name: one for name, one in measured.items() if name != coarse
    }


def test_what_is_kept_has_no_figures_and_stays_kept(finished: Finished, measured: dict[str, LinearSensitivity]) -> None:
    kept = ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"]
    keep_in_high_precision(finished.layers, kept, exact={})

    found = finished.measure()

    for name in kept:
        assert (found[name].kl_per_token, found[name].sqnr_db, found[name].is_kept) == (None, None, True)
        assert found[name].input_amax_before == measured[name].input_amax_before
    assert all(found[name] == measured[name] for name in NAMES if name not in kept)
    assert num_quantizing(finished) == 42 - 4
    assert not {f"layers.{name}" for name, _ in enabled_quantizers(finished.layers)} & {
        f"{name}.{kind}_quantizer" for name in kept for kind in ("input", "weight")
    }


def test_linear_that_quantizing_does_not_change_has_no_sqnr(finished: Finished) -> None:
    """JSON has no infinity."""
    linear = linear_of(finished, "layers.0.self_attn.o_proj")
    linear.input_quantizer.disable()
    amax_O1 = linear.weight_quantizer.amax
    linear.weight.data = (linear.weight * 127 / amax_O1).round() * amax_O1 / 127  # on its grid already
    linear.weight.data = linear.weight_quantizer(linear.weight)

    record = finished.measure()["layers.0.self_attn.o_proj"]

    assert record.sqnr_db is None
    assert record.kl_per_token is not None


def test_amax_and_outliers_are_those_of_the_group(finished: Finished) -> None:
    amax_C = torch.ones(384)
    amax_C[[5, 6, 7]] = torch.tensor([10.0, 10.1, 40.0])  # the first is just 10 times the median
    scale_C = torch.ones(384)
    scale_C[7] = 8.0
    smoothed = SmoothedGroup(Choice(alpha=0.5, scale_C=scale_C), amax_C)

    found = replace(finished, smoothed=finished.smoothed | {(1, "down"): smoothed}).measure()

    record = found["layers.1.mlp.down_proj"]
    assert (record.input_amax_before, record.input_amax_after) == (40.0, pytest.approx(10.1))
    assert record.outlier_share == pytest.approx(2 / 384)


def test_all_quantizers_are_on_again_whatever_happens(finished: Finished) -> None:
    def fail(batch: WalkBatch, hidden_ND: Tensor) -> tuple[float, int]:
        raise ZeroDivisionError

    before = finished.evaluate()
    finished.measure()
    assert num_quantizing(finished) == 42

    with pytest.raises(ZeroDivisionError):
        measure_sensitivity(finished.layers, finished.batches, kl=fail, smoothed=finished.smoothed, exact={})

    assert num_quantizing(finished) == 42
    assert finished.evaluate() == before


def test_batches_are_left_as_they_were(shared: Finished) -> None:
    before = [(batch.start_ND.clone(), batch.hidden_ND, batch.drifted_ND) for batch in shared.batches]

    shared.measure()

    for batch, (start_ND, hidden_ND, drifted_ND) in zip(shared.batches, before, strict=True):
        assert torch.equal(batch.start_ND, start_ND)
        assert batch.hidden_ND is hidden_ND
        assert batch.drifted_ND is drifted_ND


def test_weights_that_stand_on_their_grid_are_measured_against_the_exact_ones(finished: Finished) -> None:
    """What formats of few bits leave behind: no quantizer undoes their rounding."""
    exact = {name: linear_of(finished, name).weight.data.clone() for name in NAMES}
    rounded = {name: (weight_OC * 16).round() / 16 for name, weight_OC in exact.items()}

    def put(weights: dict[str, Tensor]) -> None:
        for name, weight_OC in weights.items():
            linear_of(finished, name).weight.data = weight_OC

    expected = {}
    for name in NAMES:
        put(exact | {name: rounded[name]})
        expected[name] = kl_with_quantizers_of(finished, [name])
    put(rounded)

    found = finished.measure(exact=exact)

    assert {name: record.kl_per_token for name, record in found.items()} == expected
    assert all((found[name].sqnr_db or 0) < 30 for name in NAMES)  # of the rounding, not only of the input's
    assert all(torch.equal(linear_of(finished, name).weight, rounded[name]) for name in NAMES)


def test_batches_without_responses_are_refused(shared: Finished) -> None:
    with pytest.raises(
        ModelError, match=r"quantize\.sensitivity_utterances must .*, got none that is; verify"
    ) as error:
        measure_sensitivity(shared.layers, shared.batches, kl=lambda *_: (0.0, 0), smoothed=shared.smoothed, exact={})

    assert error.value.is_shared


def record(name: str, kl: float | None, **kwargs: Any) -> LinearSensitivity:
    return LinearSensitivity(
        name=name,
        group=GROUP_OF[name.split(".", 2)[2]],
        sqnr_db=None if kl is None else 30.0,
        kl_per_token=kl,
        input_amax_before=4.0,
        input_amax_after=2.0,
        outlier_share=0.25,
        is_kept=kl is None,
    )


def test_groups_stand_by_the_sum_of_their_linears() -> None:
    records = [
        record("layers.0.self_attn.q_proj", 3.0),
        record("layers.0.self_attn.k_proj", 2.0),
        record("layers.0.self_attn.v_proj", 1.0),
        record("layers.0.mlp.down_proj", 5.0),
        record("layers.1.self_attn.o_proj", None),
        record("layers.1.mlp.down_proj", 7.0),
    ]

    assert groups_by_kl(records) == [
        ["layers.1.mlp.down_proj"],
        ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"],
        ["layers.0.mlp.down_proj"],
    ]


def test_json_names_the_five_worst_and_what_is_kept() -> None:
    records = [record(name, None if i == 6 else float(i)) for i, name in enumerate(NAMES[:7])]

    found = as_json(records, kept=[NAMES[5]], kl_per_token=0.5, kl_unquantized=0.25)

    assert found["worst"] == [NAMES[5], NAMES[4], NAMES[3], NAMES[2], NAMES[1]]
    assert found["kept"] == NAMES[5:7]
    assert (found["kl_per_token"], found["kl_unquantized"]) == (0.5, 0.25)
    assert found["linears"][5] == {
        "name": "layers.0.mlp.up_proj",
        "group": "gate_up",
        "sqnr_db": 30.0,
        "kl_per_token": 5.0,
        "input_amax_before": 4.0,
        "input_amax_after": 2.0,
        "outlier_share": 0.25,
        "is_kept": True,
    }


def test_fewest_kept_linears_bring_the_real_kl_within_the_budget(
    finished: Finished, measured: dict[str, LinearSensitivity]
) -> None:
    ranked = groups_by_kl(measured.values())
    everything = finished.evaluate()
    budget = everything / 10

    kept = keep_fewest(finished.layers, ranked, evaluate=finished.evaluate, budget=budget, exact={})

    assert finished.evaluate() == everything
    *others, last = [group for group in ranked if group[0] in kept]
    assert kept == [name for group in (*others, last) for name in group]
    assert [*others, last] == ranked[: len(others) + 1]
    quantized_yet = [name for name in NAMES if name not in kept or name in last]
    assert kl_with_quantizers_of(finished, quantized_yet) > budget
    keep_in_high_precision(finished.layers, kept, exact={})
    assert finished.evaluate() <= budget
