"""One plan on every rank, world size, process and machine, and after any stop."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from shards.mixture import Mixture
from shards.plan import Plan, share_of_rank
from tests.helpers.mixes import make_mix

ROOT = Path(__file__).parents[2]
NUM_UTTERANCES = 2_000

# Names of several releases of numpy; those that it does not know, or that the machine lacks, only warn.
CPU_FEATURES = "X86_V3 X86_V4 AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_ICL AVX512_SPR ASIMDHP ASIMDDP ASIMDFHM SVE"


def make_plan(*, temperature=1.0, max_hours_per_language=None):
    mix = make_mix(NUM_UTTERANCES)
    mixture = Mixture(
        mix.languages, mix.seconds, temperature=temperature, max_hours_per_language=max_hours_per_language
    )
    return Plan(
        mix.num_tokens,
        audio_seconds=mix.seconds,
        mixture=mixture,
        seed=11,
        token_budget=4096,
        micro_batches_per_step=8,
    )


def shares_of(step, world_size):
    return [share_of_rank(step, rank=rank, world_size=world_size) for rank in range(world_size)]


def together(shares):
    """The micro-batches of a step in its order, from the shares of all ranks."""
    turns = [share[turn] for turn in range(len(shares[0])) for share in shares]
    return [micro_batch for micro_batch in turns if micro_batch]


@pytest.mark.parametrize("world_size", range(1, 17))
def test_all_ranks_together_take_every_utterance_once_an_epoch(world_size):
    plan = make_plan()
    step = 0

    for epoch in range(3):
        taken = []
        for _ in range(plan.num_steps(epoch)):
            shares = shares_of(plan.step(step), world_size)
            assert len({len(share) for share in shares}) == 1
            taken += chain.from_iterable(chain.from_iterable(shares))
            step += 1
        assert sorted(taken) == list(range(NUM_UTTERANCES))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_stopping_anywhere_and_going_on_with_another_world_size_gives_the_same_global_batches(temperature):
    whole = make_plan(temperature=temperature)
    num_steps = whole.num_steps(0) + whole.num_steps(1) + 2
    expected = [[m for m in whole.step(number) if m] for number in range(num_steps)]

    for stop in range(num_steps):
        resumed = make_plan(temperature=temperature)  # a new process has a new plan
        world_size = 1 + stop % 8
        following = range(stop, min(stop + 3, num_steps))
        assert [together(shares_of(resumed.step(number), world_size)) for number in following] == [
            expected[number] for number in following
        ]
        assert resumed.position(stop) == whole.position(stop)


def test_resuming_twice_at_one_step_gives_the_same_batches_to_every_rank():
    first, second = make_plan(), make_plan()

    for number in (7, 8, 7):
        assert shares_of(first.step(number), 3) == shares_of(second.step(number), 3)


def digest(plan, num_steps=40):
    return hashlib.sha256(json.dumps([plan.step(number) for number in range(num_steps)]).encode()).hexdigest()


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.5, "max_hours_per_language": 0.4}], ids=["plain", "mixed"])
@pytest.mark.parametrize(
    "variables",
    [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "NPY_DISABLE_CPU_FEATURES": CPU_FEATURES}],
    ids=["another process", "another CPU"],
)
def test_plan_and_fingerprint_are_the_same_in_another_process_and_on_another_cpu(settings, variables):
    program = (
        "from tests.determinism.test_plan import digest, make_plan\n"
        f"plan = make_plan(**{settings})\n"
        "print(digest(plan), plan.fingerprint())"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )

    plan = make_plan(**settings)
    assert ended.stdout.split() == [digest(plan), plan.fingerprint()]
