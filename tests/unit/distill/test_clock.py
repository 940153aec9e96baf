"""Where the time of a step goes: every second belongs to one part, and pauses to none."""

import pytest
import torch

from qad_dist.distill.clock import PARTS, StepClock

CPU = torch.device("cpu")


class Watch:
    """A clock that shows what it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def clock(watch: Watch) -> StepClock:
    return StepClock(CPU, clock=watch)


def spend(clock: StepClock, watch: Watch, part: str, seconds: float) -> None:
    watch.now += seconds
    clock.end(part)


def test_time_since_the_last_mark_belongs_to_the_part_that_ends(clock: StepClock, watch: Watch) -> None:
    clock.start()
    for part, seconds in (("data", 1.0), ("student", 2.0), ("backward", 4.0), ("student", 8.0), ("optimizer", 16.0)):
        spend(clock, watch, part, seconds)

    seconds = clock.read()

    assert list(seconds) == list(PARTS)
    assert {part: value for part, value in seconds.items() if value} == {
        "data": 1.0,
        "student": 10.0,
        "backward": 4.0,
        "optimizer": 16.0,
    }


def test_what_was_before_the_start_does_not_count(clock: StepClock, watch: Watch) -> None:
    clock.start()
    spend(clock, watch, "data", 1.0)
    watch.now += 50.0  # an evaluation

    clock.start()
    spend(clock, watch, "data", 2.0)

    assert sum(clock.read().values()) == 3.0


def test_reading_begins_anew_and_loses_nothing_in_between(clock: StepClock, watch: Watch) -> None:
    clock.start()
    spend(clock, watch, "loss", 1.0)
    first = clock.read()
    watch.now += 3.0  # since the last mark: of the part that ends next

    spend(clock, watch, "loss", 2.0)

    assert first["loss"] == 1.0
    assert clock.read()["loss"] == 5.0


def test_parts_of_a_real_clock_add_up_to_the_time_between_first_and_last_mark() -> None:
    clock = StepClock(CPU)
    clock.start()
    for part in PARTS:
        torch.ones(100).sum()
        clock.end(part)

    seconds = clock.read()

    assert all(value > 0 for value in seconds.values())
    assert all(value == 0 for value in clock.read().values())


def test_clock_that_was_not_started_is_our_mistake(clock: StepClock) -> None:
    with pytest.raises(AssertionError, match="start"):
        clock.end("data")
