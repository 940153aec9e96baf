"""A program: how fast score decodes, beside qwen-asr, and a quantized student beside its teacher.

    python -m tests.benchmarks.score [--run FOLDER] [--rounds 3]

``qwen_asr``: the embedded teacher on the clips of ``tests.benchmarks.label``, in the groups in which score decodes,
against ``Qwen3ASRModel.transcribe`` at the batch size at which that is fastest. Both begin with samples and end with
text, in float32, with one thread, in one process; what is counted is processor time. The median ratio is to be at
least 3. The tokens of both are compared clip by clip first.

``student``: the PTQ student of a finished run (``--run``, the embedded one by default), loaded as score loads it, its
weights folded, against its teacher on the same clips, in turns. Responses have other lengths where the student hears
something else, so that seconds are divided by tokens. The median ratio is to be at most 1.3.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qad_dist.answering import NUM_GROUPS, SMALLEST_GROUP
from qad_dist.asr.groups import GroupDecoder, plan_groups
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.config import load_run
from qad_dist.config.score import ScoreConfig
from qad_dist.pairing import share_if_equal
from qad_dist.systems import find_systems, load_system
from shards.schema import SAMPLE_RATE_HZ
from tests.benchmarks.label import BATCH_SIZES, NANO_LIMIT, QwenAsr, nano_clips, timed
from tests.benchmarks.read import MALLOC
from tests.helpers.qwen import NANO, Samples, load

SETTINGS = ScoreConfig(max_response_tokens=NANO_LIMIT, max_tokens_per_second=1000)
"""Limits that qwen-asr has, too."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", default="runs/toy", help="folder of a run of configs/toy.yaml with a PTQ student")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.score", *sys.argv[1:]], os.environ | MALLOC)
    torch.set_num_threads(1)
    clips = nano_clips()
    tell("student", measure_student(clips, options.run, options.rounds))
    tell("qwen_asr", measure_qwen_asr(clips, options.rounds))


def tell(part: str, measured: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"part": part, **measured, "load_average": os.getloadavg()[0]}) + "\n")
    sys.stdout.flush()


def measure_qwen_asr(clips: Sequence[Samples], rounds: int) -> dict[str, Any]:
    model, peer = load(audio_attention="full"), QwenAsr(NANO, max_response_tokens=NANO_LIMIT)
    seconds = sum(map(len, clips)) / SAMPLE_RATE_HZ
    found, swept = decode_groups(model, clips), {}
    assert peer.transcribe(clips, batch_size=1) == found, "clip by clip both must choose the same tokens"
    for size in BATCH_SIZES:
        swept[size], _ = timed(lambda size=size: peer.transcribe(clips, batch_size=size))
    best = min(swept, key=lambda size: swept[size])
    own, others = in_turns(lambda: decode_groups(model, clips), lambda: peer.transcribe(clips, batch_size=best), rounds)
    return {
        "clips": len(clips),
        "audio_seconds": round(seconds, 1),
        "best_batch_size": best,
        "times_real_time": {"ours": real_time(seconds, own), "qwen_asr": real_time(seconds, others)},
        "ratio": ratios(others, own),
    }


def measure_student(clips: Sequence[Samples], folder: str, rounds: int) -> dict[str, Any]:
    run = load_run("configs/toy.yaml", [f"run={folder}", "score.students=[ptq]"])
    cpu = torch.device("cpu")
    teacher, student = (
        load_system(run, system, audio_attention="windowed", device=cpu)[0] for system in find_systems(run)
    )
    assert share_if_equal(teacher, student), "the student must have its teacher's audio tower"
    tokens = [sum(map(len, decode_groups(model, clips))) for model in (teacher, student)]
    own, others = in_turns(lambda: decode_groups(student, clips), lambda: decode_groups(teacher, clips), rounds)
    per_token = [[seconds / tokens[1] for seconds in own], [seconds / tokens[0] for seconds in others]]
    return {
        "response_tokens": {"teacher": tokens[0], "ptq": tokens[1]},
        "seconds": {"teacher": round(float(np.median(others)), 2), "ptq": round(float(np.median(own)), 2)},
        "ratio": ratios(*per_token),
    }


def in_turns(ours: Any, theirs: Any, rounds: int) -> tuple[list[float], list[float]]:
    own, others = [], []
    for _ in range(rounds):
        own.append(timed(ours)[0])
        others.append(timed(theirs)[0])
    return own, others


def ratios(upper: Sequence[float], lower: Sequence[float]) -> dict[str, float]:
    found = [above / below for above, below in zip(upper, lower, strict=True)]
    return {"min": round(min(found), 2), "median": round(float(np.median(found)), 2), "max": round(max(found), 2)}


def real_time(audio_seconds: float, taken: Sequence[float]) -> float:
    return round(audio_seconds / float(np.median(taken)), 1)


def decode_groups(model: AsrModel, clips: Sequence[Samples]) -> list[list[int]]:
    """Response tokens of clips, decoded as a set is scored."""
    durations_U = np.array([len(clip) / SAMPLE_RATE_HZ for clip in clips])
    groups = plan_groups(durations_U, SETTINGS, num_groups=NUM_GROUPS, smallest=SMALLEST_GROUP)
    decoder = GroupDecoder(model, SETTINGS, durations_U, [None] * len(clips), groups)
    found: list[list[int]] = [[] for _ in clips]
    for group in groups:
        batches = [
            list(zip(batch, log_mels([clips[place] for place in batch], model.extractor), strict=True))
            for batch in group
        ]
        for place, hypothesis in decoder.decode(batches):
            found[place] = list(hypothesis.token_ids)
    return found


if __name__ == "__main__":
    main()
