"""Time and memory of the plan by number of utterances: `python -m tests.benchmarks.plan --utterances 1000000 10000000`.

Prints one JSON line for each number, from a process of its own, so that the peak memory is that number's.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from shards.mixture import Mixture
from shards.plan import Plan
from tests.helpers.mixes import Mix, make_mix


def measure(num_utterances: int, options: argparse.Namespace) -> dict[str, float | str]:
    """Times of the first step, of the walk to the end and of all steps, and what they need and leave empty."""
    mix = make_mix(num_utterances, seed=options.seed)
    table_mb = _peak_mb()
    begun = time.perf_counter()
    plan = _plan(mix, options)
    plan.step(0)
    first_step_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    fingerprint = plan.fingerprint()
    fingerprint_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    num_steps = plan.num_steps(0)
    walk_seconds = time.perf_counter() - begun
    steps = _walk(plan, mix, num_steps, token_budget=options.token_budget)
    return {
        "utterances": num_utterances,
        "first_step_seconds": round(first_step_seconds, 2),
        "fingerprint_seconds": round(fingerprint_seconds, 2),
        "walk_seconds": round(walk_seconds, 2),
        **steps,
        "microseconds_per_utterance": round(1e6 * float(steps["all_steps_seconds"]) / num_utterances, 2),
        "table_mb": table_mb,
        "peak_mb": _peak_mb(),
        "fingerprint": fingerprint[:12],
    }


def _plan(mix: Mix, options: argparse.Namespace) -> Plan:
    return Plan(
        mix.num_tokens,
        audio_seconds=mix.seconds,
        mixture=Mixture(
            mix.languages,
            mix.seconds,
            temperature=options.temperature,
            max_hours_per_language=options.max_hours_per_language,
        ),
        seed=options.seed,
        token_budget=options.token_budget,
        micro_batches_per_step=options.micro_batches_per_step,
    )


def _walk(plan: Plan, mix: Mix, num_steps: int, *, token_budget: int) -> dict[str, float]:
    """All steps of the first epoch; of all but the last one, the room left and the unevenness of the audio."""
    spent, planned, used, room, excess = 0.0, 0, 0, 0, 0.0
    for number in range(num_steps):
        begun = time.perf_counter()
        step = plan.step(number)
        spent += time.perf_counter() - begun
        planned += sum(map(len, step))
        if number + 1 < num_steps:
            audio = np.array([mix.seconds[micro_batch].sum() for micro_batch in step])
            excess = max(excess, audio.max() / audio.mean() - 1)
            used += sum(int(mix.num_tokens[micro_batch].sum()) for micro_batch in step)
            room += len(step) * token_budget
    return {
        "steps": num_steps,
        "planned_utterances": planned,
        "all_steps_seconds": round(spent, 2),
        "empty_percent": round(100 * (1 - used / room), 3) if room else 0.0,
        "most_audio_above_mean_percent": round(100 * excess, 3),
    }


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Measure each number in a process of its own."""
    parser = argparse.ArgumentParser(description="Time and memory of the plan by number of utterances.")
    parser.add_argument("--utterances", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--micro-batches-per-step", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-hours-per-language", type=float)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.utterances) == 1:
        print(json.dumps(measure(options.utterances[0], options)), flush=True)
        return
    shared = {name: value for name, value in vars(options).items() if name != "utterances" and value is not None}
    others = [f"--{name.replace('_', '-')}={value}" for name, value in shared.items()]
    for number in options.utterances:
        command = [sys.executable, "-m", "tests.benchmarks.plan", "--utterances", str(number), *others]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
