"""Progress of a rank: the numbers of a line, and when there is one."""

import logging

import pytest

from qad_dist.runtime.progress import Progress, StepProgress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock, caplog: pytest.LogCaptureFixture) -> Progress:
    caplog.set_level(logging.INFO, logger="qad_dist.runtime.progress")
    return Progress("label", clock=clock)


def test_line_tells_speed_and_how_long_all_ranks_together_still_take(progress, clock, caplog):
    clock.seconds += 40
    progress.add(utterances=100, audio_seconds=300)
    progress.add(utterances=20, audio_seconds=100)

    progress.tell(left_seconds=lambda: 7200, ranks=4)

    assert caplog.messages == [
        "event=progress stage=label utterances=120 audio_hours=0.111 rtfx=10.0 left_hours=2.000 eta_seconds=180"
    ]


def test_there_is_a_line_every_30_seconds_or_when_asked_for(progress, clock, caplog):
    asked: list[float] = []

    def left_seconds() -> float:
        asked.append(clock.seconds)
        return 0.0

    for seconds in (29, 1, 5, 24, 1):
        clock.seconds += seconds
        progress.tell(left_seconds=left_seconds, ranks=1)
    progress.tell(left_seconds=left_seconds, ranks=1, now=True)

    assert asked == [1030, 1060, 1060]
    assert len(caplog.messages) == 3


def test_eta_is_unknown_before_anything_is_done(progress, clock, caplog):
    clock.seconds += 31

    progress.tell(left_seconds=lambda: 60, ranks=1)

    assert caplog.messages[0].endswith("rtfx=0.0 left_hours=0.017 eta_seconds=unknown")


def test_steps_are_told_every_thirty_seconds_with_the_time_that_is_left(clock, caplog):
    caplog.set_level(logging.INFO, logger="qad_dist.runtime.progress")
    steps = StepProgress("train", done=100, steps=600, clock=clock)

    for step in range(101, 121):  # 10 s each
        clock.seconds += 10
        steps.advance(step)
    steps.close()

    assert caplog.messages[:2] == [
        "event=progress stage=train step=103/600 seconds_per_step=10.00 eta_seconds=4970",
        "event=progress stage=train step=106/600 seconds_per_step=10.00 eta_seconds=4940",
    ]
    assert len(caplog.messages) == 6
