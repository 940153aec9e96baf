"""A program: the teacher decoded by this project and by vLLM, the same clips in the same dtype: agreement, then speed.

    python -m tests.benchmarks.label_vllm --vllm-python PYTHON [--rounds 3] [--threads 1] [--in-flight 8 32 64]

Clips: spoken digits in all languages and longer mixes of them; AN4 and pieces of long recordings where QAD_SPEECH_DIR
names a folder with them. Compared are token sequences, transcripts and log-probabilities. Where the first tokens that
differ are, this project's own float32 log-probabilities of both are told: a difference is a near-tie if they are within
0.01 of each other.

Timed are whole passes from samples to hypotheses, in turn, with the server started and warm: wall seconds, and
processor seconds of the processes of a side. vLLM computes log-mels in a process of its own while it decodes in another
one, so that it uses two cores where there are two. Offline is ``vllm.LLM``, in a run of its own and without HTTP: it
prepares all prompts before it decodes. vLLM's engine also spends processor time while it waits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from qad_dist.asr.checkpoint import load_config
from qad_dist.asr.collate import Example, collate
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.asr.transcribe import Hypothesis, Request, decode
from qad_dist.asr.vllm import AudioRequest, VllmTeacher, transcribe_with_vllm
from qad_dist.asr.vllm_server import VllmServer
from qad_dist.head import FrozenHead
from shards.plan import plan_decoding
from tests.benchmarks.read import MALLOC
from tests.helpers.clips import recorded_clips, write_wavs
from tests.helpers.qwen import NANO, SAMPLE_RATE_HZ, Samples, digit_mixes, digits, load

NEAR_TIE = 0.01
"""Nats. In float32 the two engines' log-probabilities are 1e-4 apart at most."""
LIMIT_TOKENS, MAX_LENGTH = 160, 640
SLOTS = 128
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Clip:
    """One utterance; its samples are those of 16-bit audio, as packed shards hold them."""

    key: str
    kind: str
    audio_A: Samples

    @property
    def seconds(self) -> float:
        return len(self.audio_A) / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two responses part."""

    key: str
    seconds: float
    position: int
    ours: str
    theirs: str
    gap: float
    """Our log-probability of our token less that of theirs, after the same tokens."""

    @property
    def is_near_tie(self) -> bool:
        return 0 <= self.gap < NEAR_TIE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="python of an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[8, 32, 64])
    options = parser.parse_args()
    wanted = {**MALLOC, "OMP_NUM_THREADS": str(options.threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "tests.benchmarks.label_vllm", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})
    torch.set_num_threads(options.threads)
    speech = os.environ.get("QAD_SPEECH_DIR")
    clips = make_clips(Path(speech) if speech else None)
    teacher = load()
    slots = max(options.in_flight)
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "vllm.log"
        with start_server(options.vllm_python, log_path=log_path, slots=slots) as server:
            vllm = VllmTeacher(server.client, server.client.served())
            found = measure(teacher, vllm, clips, options.rounds, options.in_flight)
        offline = measure_offline(options.vllm_python, Path(folder), teacher, clips, options.rounds, slots)
    found["audio_seconds_per_second"]["vllm, offline"] = offline
    sys.stdout.write(json.dumps({**found, "load_average": os.getloadavg()[0]}) + "\n")


def start_server(python: str, *, log_path: Path, slots: int) -> VllmServer:
    """A server of the embedded teacher in float32."""
    return VllmServer(
        python,
        NANO,
        log_path=log_path,
        dtype="float32",
        max_length=MAX_LENGTH,
        slots=slots,
        config=load_config(NANO),
    )


def make_clips(speech: Path | None) -> list[Clip]:
    """80 clips of digits and 24 longer mixes of them; with recorded speech 60 of AN4 and 36 pieces of 8 to 30 s."""
    lengths = np.random.default_rng(0).uniform(8, 30, 24)
    kinds = {"digits": digits(80), "mixed digits": digit_mixes(lengths.tolist())}
    if speech is not None:
        recorded = recorded_clips(speech, num_short=60, num_long=36)
        kinds |= {"AN4": recorded[:60], "long recordings": recorded[60:]}
    return [
        Clip(f"{kind} {i}", kind, as_16_bits(clip)) for kind, clips in kinds.items() for i, clip in enumerate(clips)
    ]


def as_16_bits(audio: Samples) -> Samples:
    return (np.clip(np.rint(audio * 32768), -32768, 32767) / 32768).astype(np.float32)


def by_this_project(
    teacher: AsrModel, clips: Sequence[Clip], *, languages: Sequence[str | None] | None = None
) -> list[Hypothesis]:
    """As label does: longest first, 160 s of audio in a batch, 128 slots."""
    told = languages or [None] * len(clips)
    plan = plan_decoding([clip.seconds for clip in clips], batch_audio_seconds=160.0, max_utterances=SLOTS // 4)

    def batches() -> Iterator[list[Request]]:
        for batch in plan:
            mels = log_mels([clips[i].audio_A for i in batch], teacher.extractor)
            yield [Request(mel_MF, LIMIT_TOKENS, told[i]) for i, mel_MF in zip(batch, mels, strict=True)]

    return in_order(plan, decode(teacher, batches(), slots=SLOTS, max_length=MAX_LENGTH))


def by_vllm(
    teacher: AsrModel,
    vllm: VllmTeacher,
    clips: Sequence[Clip],
    *,
    in_flight: int,
    languages: Sequence[str | None] | None = None,
    limit: int = LIMIT_TOKENS,
) -> list[Hypothesis]:
    """In the same order."""
    told = languages or [None] * len(clips)
    plan = plan_decoding([clip.seconds for clip in clips], batch_audio_seconds=160.0, max_utterances=SLOTS // 4)
    requests = (AudioRequest(clips[i].audio_A, limit, told[i]) for batch in plan for i in batch)
    return in_order(plan, transcribe_with_vllm(vllm, teacher.prompt, requests, in_flight=in_flight))


def in_order(plan: Sequence[Sequence[int]], found: Iterable[tuple[int, Hypothesis]]) -> list[Hypothesis]:
    """Hypotheses in the order of the clips, given their numbers in the plan's."""
    places = [place for batch in plan for place in batch]
    by_place = {places[number]: hypothesis for number, hypothesis in found}
    return [by_place[place] for place in range(len(places))]


def differences(
    teacher: AsrModel,
    clips: Sequence[Clip],
    ours: Sequence[Hypothesis],
    theirs: Sequence[Sequence[int]],
    *,
    languages: Sequence[str | None] | None = None,
) -> list[Difference]:
    """Each response that is another one, and how near the two tokens are where they part."""
    found = []
    told = languages or [None] * len(clips)
    for clip, hypothesis, other, language in zip(clips, ours, theirs, told, strict=True):
        own = hypothesis.token_ids
        if own == tuple(other):
            continue
        position = next(i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b)
        logprobs_V = next_logprobs(teacher, clip.audio_A, own[:position], language=language)
        names = [teacher.prompt.tokenizer.decode([ids[position]]) for ids in (own, other)]
        gap = float(logprobs_V[own[position]] - logprobs_V[other[position]])
        found.append(Difference(clip.key, clip.seconds, position, *names, gap))
    return found


@torch.no_grad()
def next_logprobs(
    teacher: AsrModel, audio_A: Samples, token_ids: Sequence[int], *, language: str | None = None
) -> Tensor:
    """``[V]``: log-probabilities of what follows prompt and tokens, by one pass without any cache."""
    mel_MF = log_mels([audio_A], teacher.extractor)[0]
    example = Example(
        key="clip", mel_MF=mel_MF, response_ids=[*token_ids, teacher.prompt.end_id], prompt_language=language
    )
    embedded = embed(teacher, collate([example], prompt=teacher.prompt))
    states_RD = response_states(DecoderStack(teacher.decoder.layers), embedded, teacher.decoder.norm)
    return FrozenHead(teacher.head_weight_VD)(states_RD)[-1].log_softmax(-1)


def measure(
    teacher: AsrModel, vllm: VllmTeacher, clips: Sequence[Clip], rounds: int, in_flight: Sequence[int]
) -> dict[str, Any]:
    ours = by_this_project(teacher, clips)
    theirs = by_vllm(teacher, vllm, clips, in_flight=max(in_flight))
    unlike = differences(teacher, clips, ours, [hypothesis.token_ids for hypothesis in theirs])
    assert all(difference.is_near_tie for difference in unlike), unlike
    sides: dict[str, Callable[[], object]] = {OURS: lambda: by_this_project(teacher, clips)}
    for count in in_flight:
        sides[f"vllm, {count} in flight"] = lambda count=count: by_vllm(teacher, vllm, clips, in_flight=count)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    # The server polls while it waits: that is not on our account. Client and server are one side.
    own = [psutil.Process()]
    both = [*own, *own[0].children(recursive=True)]
    for _ in range(rounds):
        for name, side in sides.items():
            spent[name].append(time_of(side, own if name == OURS else both))
    return {
        "vllm": vllm.served.version,
        "clips": len(clips),
        "audio_seconds": round(sum(clip.seconds for clip in clips), 1),
        "threads": torch.get_num_threads(),
        "agreement": agreement(clips, ours, theirs),
        "differences": [
            f"{d.key} ({d.seconds:.1f} s) token {d.position}: {d.ours!r} or {d.theirs!r}, {d.gap:.5f} apart"
            for d in unlike
        ],
        "audio_seconds_per_second": {name: rates(clips, times) for name, times in spent.items()},
    }


def agreement(clips: Sequence[Clip], ours: Sequence[Hypothesis], theirs: Sequence[Hypothesis]) -> dict[str, Any]:
    """By kind of clip: how many there are, equal token sequences and transcripts, farthest log-probabilities."""
    total, tokens, texts = Counter[str](), Counter[str](), Counter[str]()
    apart: dict[str, float] = {}
    for clip, own, other in zip(clips, ours, theirs, strict=True):
        total[clip.kind] += 1
        texts[clip.kind] += (own.text, own.language) == (other.text, other.language)
        if own.token_ids == other.token_ids:
            tokens[clip.kind] += 1
            distance = float(np.abs(np.subtract(own.token_logprobs, other.token_logprobs)).max())
            apart[clip.kind] = max(apart.get(clip.kind, 0.0), distance)
    return {
        kind: {
            "clips": total[kind],
            "tokens": tokens[kind],
            "transcripts": texts[kind],
            "logprobs_apart": apart.get(kind),
        }
        for kind in total
    }


def measure_offline(
    python: str, folder: Path, teacher: AsrModel, clips: Sequence[Clip], rounds: int, slots: int
) -> dict[str, list[int]]:
    """``vllm.LLM`` on the same clips, longest first, with the server's settings."""
    wavs = folder / "clips"
    write_wavs([clip.audio_A for clip in sorted(clips, key=lambda clip: -clip.seconds)], wavs)
    options = {
        "dtype": "float32",
        "max_model_len": MAX_LENGTH,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "kv_cache_memory_bytes": 1 << 30,
    }
    ids = json.dumps([teacher.prompt.end_id, *teacher.prompt.build(1)])
    program = Path(__file__).with_name("label_vllm_offline.py")
    variables = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables.pop("PYTHONPATH", None)
    answer_path = folder / "offline.json"
    words = [python, program, NANO, wavs, ids, LIMIT_TOKENS, slots, rounds, json.dumps(options), answer_path]
    with (folder / "offline.log").open("wb") as log_file:
        subprocess.run(list(map(str, words)), stdout=log_file, stderr=log_file, env=variables, check=True, timeout=1800)
    return rates(clips, json.loads(answer_path.read_text()))


def rates(clips: Sequence[Clip], times: Sequence[tuple[float, float]]) -> dict[str, list[int]]:
    """Seconds of audio for each second, slowest, median and fastest round; times are wall and processor seconds."""
    seconds = sum(clip.seconds for clip in clips)
    wall, processor = np.array(times).T
    return {
        name: [round(seconds / value) for value in (spent.max(), np.median(spent), spent.min())]
        for name, spent in (("wall", wall), ("processor", processor))
    }


def time_of(side: Callable[[], object], processes: Sequence[psutil.Process]) -> tuple[float, float]:
    """Wall seconds, and processor seconds of the processes that are this side's."""
    processor, begun = processor_seconds(processes), time.perf_counter()
    side()
    return time.perf_counter() - begun, processor_seconds(processes) - processor


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    main()
