"""A program: seconds of audio transcribed in a second, by this project and by qwen-asr, side by side.

    python -m tests.benchmarks.label [--part nano real] [--rounds 3] [--wavs FOLDER]

``nano``: the embedded teacher, on spoken digits and, from the folder that QAD_SPEECH_DIR names, recorded speech.
``real``: two layers of tower and decoder each in the real model's dimensions, with random weights and a vocabulary of
151,936, on clips of 1 to 30 s in no order. Such weights say nothing: every response has 3.3 tokens a second and 4.

Both begin with samples and end with text, in float32, with one thread, in one process, with attention over the whole
clip, which is what qwen-asr does here. qwen-asr is told the checkpoint's end token, without which it would not stop on
the small vocabulary, and where each response ends on random weights; it is given the batch size at which it is fastest,
among those for which its logits of all prompt positions fit into 9 GiB.
First the tokens of both are compared, clip by clip. Then both take turns, and what is counted is processor time. The
line of JSON for each part has the seconds of audio for each second of it and how many times ours goes into the other's,
of which the median is to be at least 3 for ``nano`` and 1.5 for ``real``.

``--wavs`` writes the clips of ``nano`` to a folder and does nothing else: for decoders that are another program.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.asr.reference import load_with_qwen_asr
from qad_dist.asr.transcribe import Request, decode, slot_length
from shards.plan import plan_decoding
from shards.schema import SAMPLE_RATE_HZ
from tests.benchmarks.read import MALLOC
from tests.helpers.clips import clips_of_all_kinds, write_wavs
from tests.helpers.qwen import NANO, Samples, digit_mixes, load, write_random_model

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
NANO_SHORT, NANO_LONG, NANO_LIMIT = 160, 32, 128
REAL_CLIPS, REAL_SECONDS = 40, (1.0, 30.0)
# qwen-asr computes logits of all prompt positions, padding too: batches for which they are larger are left out.
MOST_LOGITS_BYTES = 9 << 30
TOKENS_PER_SECOND, MORE_TOKENS = 3.3, 4
SLOTS = 64
BATCH_AUDIO_SECONDS = 160.0
AUDIO_TOWER = {
    "d_model": 896,
    "encoder_layers": 2,
    "num_hidden_layers": 2,
    "encoder_attention_heads": 14,
    "encoder_ffn_dim": 3584,
    "downsample_hidden_size": 480,
}
DECODER = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_scaling": {
        "interleaved": True,
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
        "rope_type": "default",
    },
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--part", choices=("nano", "real"), nargs="+", default=["nano", "real"])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--wavs", type=Path, help="write the clips of nano here and do nothing else")
    options = arguments.parse_args()
    if options.wavs:
        write_wavs(nano_clips(), options.wavs)
        return
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.label", *sys.argv[1:]], os.environ | MALLOC)
    torch.set_num_threads(1)
    for part in options.part:
        measure = {"nano": measure_nano, "real": measure_real}[part]
        sys.stdout.write(json.dumps({"part": part, **measure(options.rounds)}) + "\n")
        sys.stdout.flush()


def nano_clips() -> list[Samples]:
    """Clips of 0.5 to 30 s in a random order, recorded ones among them where there is recorded speech."""
    speech = os.environ.get("QAD_SPEECH_DIR")
    return clips_of_all_kinds(Path(speech) if speech else None, num_short=NANO_SHORT, num_long=NANO_LONG)


def measure_nano(rounds: int) -> dict[str, Any]:
    clips = nano_clips()
    peer = QwenAsr(NANO, max_response_tokens=NANO_LIMIT)
    return measure(clips, [NANO_LIMIT] * len(clips), load(audio_attention="full"), peer, rounds)


def measure_real(rounds: int) -> dict[str, Any]:
    durations = np.random.default_rng(0).uniform(*REAL_SECONDS, REAL_CLIPS).tolist()
    clips = digit_mixes(durations)
    limits = [round(TOKENS_PER_SECOND * seconds + MORE_TOKENS) for seconds in durations]
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder) / "model", audio=AUDIO_TOWER, **DECODER)
        peer = QwenAsr(path, max_response_tokens=max(limits), limits=limits)
        return measure(clips, limits, load(path, audio_attention="full"), peer, rounds)


def measure(
    clips: Sequence[Samples], limits: Sequence[int], model: AsrModel, peer: "QwenAsr", rounds: int
) -> dict[str, Any]:
    seconds = sum(map(len, clips)) / SAMPLE_RATE_HZ
    expected = decode_clips(model, clips, limits)
    swept: dict[int, float] = {}
    shares: dict[int, float] = {}
    for size in BATCH_SIZES:
        positions = min(size, len(clips)) * slot_length(
            model.prompt, [max(map(len, clips)) / SAMPLE_RATE_HZ], [0], [None]
        )
        if positions * len(model.head_weight_VD) * 4 > MOST_LOGITS_BYTES:
            break
        swept[size], found = timed(lambda size=size: peer.transcribe(clips, batch_size=size))
        shares[size] = float(np.mean([one == other for one, other in zip(found, expected, strict=True)]))
        print(f"qwen-asr, {size} at once: {seconds / swept[size]:.1f} x real time", file=sys.stderr, flush=True)
        if size >= len(clips):
            break
    assert shares[1] == 1.0, f"clip by clip both must choose the same tokens, got a share of {shares[1]}"
    best = min(swept, key=lambda size: swept[size])
    own, others = [], []
    for _ in range(rounds):
        own.append(timed(lambda: decode_clips(model, clips, limits))[0])
        others.append(timed(lambda: peer.transcribe(clips, batch_size=best))[0])
    ratios = [theirs / mine for mine, theirs in zip(own, others, strict=True)]
    return {
        "clips": len(clips),
        "audio_seconds": round(seconds, 1),
        "response_tokens": sum(map(len, expected)),
        "same_tokens_clip_by_clip": shares[1],
        "same_tokens_in_best_batches": round(shares[best], 3),
        "times_real_time": {
            "ours": round(seconds / float(np.median(own)), 1),
            "qwen_asr": round(seconds / float(np.median(others)), 1),
        },
        "qwen_asr_by_batch_size": {size: round(seconds / taken, 1) for size, taken in swept.items()},
        "best_batch_size": best,
        "rounds": rounds,
        "ratio": {"min": round(min(ratios), 2), "median": round(float(np.median(ratios)), 2)},
        "load_average": os.getloadavg()[0],
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came of it."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


def decode_clips(
    model: AsrModel, clips: Sequence[Samples], limits: Sequence[int], *, slots: int = SLOTS
) -> list[list[int]]:
    """Response tokens of clips, decoded as a shard is."""
    durations = [len(clip) / SAMPLE_RATE_HZ for clip in clips]
    slots = min(slots, len(clips))
    plan = plan_decoding(durations, batch_audio_seconds=BATCH_AUDIO_SECONDS, max_utterances=max(1, slots // 4))

    def requests() -> Iterator[list[Request]]:
        for batch in plan:
            mels = log_mels([clips[i] for i in batch], model.extractor)
            yield [Request(mel_MF, limits[i]) for i, mel_MF in zip(batch, mels, strict=True)]

    length = slot_length(model.prompt, durations, limits, [None] * len(clips))
    order = [i for batch in plan for i in batch]
    found: list[list[int]] = [[] for _ in clips]
    for number, hypothesis in decode(model, requests(), slots=slots, max_length=length):
        found[order[number]] = list(hypothesis.token_ids)
    return found


class QwenAsr:
    """``Qwen3ASRModel.transcribe`` as it is; its ``generate`` is only told more: where responses end."""

    def __init__(self, folder: Path, *, max_response_tokens: int, limits: Sequence[int] | None = None) -> None:
        cpu = torch.device("cpu")
        self._asr = load_with_qwen_asr(folder, dtype=torch.float32, device=cpu, max_response_tokens=max_response_tokens)
        self._end_id = self._asr.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._limits = limits
        self._generate = self._asr.model.generate
        self._asr.model.generate = self._told_generate
        self._tokens: list[list[int]] = []

    def transcribe(self, clips: Sequence[Samples], *, batch_size: int) -> list[list[int]]:
        """Response tokens; text is made of them as well."""
        self._tokens = []
        self._asr.max_inference_batch_size = batch_size
        self._asr.transcribe(audio=[(clip, SAMPLE_RATE_HZ) for clip in clips], language=None)
        return self._tokens

    def _told_generate(self, **inputs: Any) -> Any:
        num_clips, length = inputs["input_ids"].shape
        begun = len(self._tokens)
        limits = None if self._limits is None else self._limits[begun : begun + num_clips]
        told = {} if limits is None else {"stopping_criteria": StoppingCriteriaList([_Limits(limits, length)])}
        found = self._generate(**inputs, **told, eos_token_id=self._end_id, pad_token_id=self._end_id)
        for row, tokens in enumerate(found.sequences[:, length:].tolist()):
            tokens = tokens[: limits[row]] if limits else tokens
            self._tokens.append(tokens[: tokens.index(self._end_id) + 1] if self._end_id in tokens else tokens)
        return found


class _Limits(StoppingCriteria):
    """Ends each response of a batch at its own length."""

    def __init__(self, limits: Sequence[int], num_prompt_tokens: int) -> None:
        self._limits, self._num_prompt_tokens = torch.tensor(limits), num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] - self._num_prompt_tokens >= self._limits


if __name__ == "__main__":
    main()
