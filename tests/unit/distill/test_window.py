"""What a line of the log says: means over what was finite since the last line, and who was not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qad_dist.distill.clock import PARTS
from qad_dist.distill.loss import LossSums
from qad_dist.distill.window import BadBatch, Window, peak_memory_bytes
from tests.helpers.loops import settings
from tests.helpers.states import make_batch

CPU = torch.device("cpu")
BUDGET = 256


def sums_of(loss: float, kl: float, ce: float, agreements: float) -> LossSums:
    return LossSums(*(torch.tensor(value) for value in (loss, kl, ce, agreements)))


@pytest.fixture
def window() -> Window:
    return Window(CPU, settings(micro_batch_tokens=BUDGET))


def end_step(window: Window, *, audio_seconds: float = 10.0) -> None:
    window.clock.end("optimizer")
    window.end_step(audio_seconds=audio_seconds)


def test_line_has_means_over_the_tokens_of_all_micro_batches(window: Window) -> None:
    window.add(sums_of(6.0, 3.0, 9.0, 2.0), make_batch([1, 2, 3], [0, 0, 0]), step=0)
    window.add(sums_of(2.0, 5.0, 1.0, 4.0), make_batch([1] * 5, [0] * 5), step=0)
    end_step(window)
    end_step(window)

    values = window.close().values

    assert [values[name] for name in ("loss", "kl", "ce", "agreement")] == [8 / 8, 8 / 8, 10 / 8, 6 / 8]
    assert values["response_tokens"] == 8
    assert values["unfilled"] == 1 - 8 / (2 * BUDGET)
    seconds = 2 * values["seconds_per_step"]
    assert values["tokens_per_second"] * seconds == pytest.approx(8)
    assert values["audio_seconds_per_second"] * seconds == pytest.approx(20)
    assert sum(values[f"seconds_{part}"] for part in PARTS) == pytest.approx(values["seconds_per_step"])


def test_loss_is_the_sum_that_is_learned_from() -> None:
    """KL and cross-entropy are means over response tokens, the distance of hidden states over all tokens."""
    window = Window(CPU, settings(micro_batch_tokens=BUDGET, hidden_weight=0.5))
    prompt_and_response = replace(make_batch([1] * 8, [0] * 8), weighted_rows=2)
    window.add(sums_of(6.0, 3.0, 9.0, 2.0), prompt_and_response, step=0, hidden_distance=torch.tensor(4.0))
    window.add(sums_of(2.0, 5.0, 1.0, 4.0), prompt_and_response, step=0, hidden_distance=torch.tensor(12.0))
    end_step(window)

    values = window.close().values

    assert values["hidden_distance"] == (4 + 12) / 16
    assert values["loss"] == (6 + 2) / 4 + 0.5 * (4 + 12) / 16
    assert values["kl"] == (3 + 5) / 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_micro_batch_whose_loss_is_no_number_is_named_and_in_no_mean(window: Window, bad: float) -> None:
    window.add(sums_of(6.0, 3.0, 9.0, 2.0), make_batch([1, 2, 3], [0, 0, 0], key="good"), step=4)
    window.add(sums_of(bad, torch.nan, 1.0, 4.0), make_batch([1] * 5, [0] * 5, key="bad"), step=5)
    end_step(window)

    line = window.close()

    assert line.bad == [BadBatch(step=5, keys=("bad",))]
    assert [line.values[name] for name in ("loss", "kl", "ce", "agreement")] == [2.0, 1.0, 3.0, 2 / 3]
    assert line.values["response_tokens"] == 3
    assert line.values["tokens_per_second"] * line.values["seconds_per_step"] == pytest.approx(8)  # it was computed


def test_next_line_begins_empty(window: Window) -> None:
    window.add(sums_of(torch.nan, 1.0, 1.0, 1.0), make_batch([1] * 9, [0] * 9), step=0)
    end_step(window)
    window.close()

    window.add(sums_of(6.0, 3.0, 9.0, 2.0), make_batch([1, 2, 3], [0, 0, 0]), step=1)
    end_step(window, audio_seconds=4.0)
    line = window.close()

    assert line.bad == []
    assert (line.values["kl"], line.values["response_tokens"]) == (1.0, 3)
    assert line.values["audio_seconds_per_second"] * line.values["seconds_per_step"] == pytest.approx(4.0)


def test_batches_without_weight_are_work_of_nobody(window: Window) -> None:
    nothing = make_batch([1] * 5, [0] * 5).without_weight()
    window.add(sums_of(0.0, 0.0, 0.0, 0.0), nothing, step=0)
    end_step(window)

    values = window.close().values

    assert [values[name] for name in ("kl", "response_tokens", "tokens_per_second", "unfilled")] == [0, 0, 0, 1]


def test_rows_of_what_could_not_be_read_are_in_no_mean(window: Window) -> None:
    batch = make_batch([1] * 5, [0] * 5)
    part = replace(batch, kl_weight_R=torch.tensor([1.0, 0, 0, 0, 0]), weighted_rows=1)
    window.add(sums_of(2.0, 3.0, 1.0, 1.0), part, step=0)
    end_step(window)

    assert window.close().values["kl"] == 3.0


def test_sums_of_many_small_values_stay_exact(window: Window) -> None:
    """In float32, 1e8 and then ten thousand ones would stay 1e8."""
    batch = make_batch([1], [0])
    window.add(sums_of(1.0, 1e8, 1.0, 1.0), batch, step=0)
    for _ in range(10_000):
        window.add(sums_of(1.0, 1.0, 1.0, 1.0), batch, step=0)
    end_step(window)

    assert window.close().values["kl"] == (1e8 + 10_000) / 10_001


def test_peak_memory_is_the_most_that_this_process_has_held() -> None:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

    assert peak_memory_bytes(CPU) == pytest.approx(int(line.split()[1]) * 1024, rel=0.02)
