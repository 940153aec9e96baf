"""A program: from packed shards to the model's input, by this project and as it is usually written, side by side.

    python tests/benchmarks/read.py [--pack FOLDER] [--rounds 5]

Ours: each utterance by its offset, decoded to samples, log-mels of a batch packed side by side. The usual way:
webdataset's pipeline with soundfile as decoder, WhisperFeatureExtractor on a batch padded to its longest utterance.
Both read the same files in the same order and make the same batches, in one process, with one thread for sums, in turn.
What is counted is processor time. The line of JSON on stdout has the seconds of audio for each second of it, and how
many times ours goes into the other's, of which the median over the rounds is to be at least 1.5. The log-mel alone is
set beside the extractor's, one utterance after the other.

Without ``--pack`` the training recordings of AN4 are packed first, from the folder that QAD_SPEECH_DIR names, or else
noise of the length and loudness of speech.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset
from torch import Tensor
from transformers import WhisperFeatureExtractor

from qad_dist.asr.mel import num_frames, packed_log_mels
from shards.index import read_index, read_utterances
from shards.read import Shards, refuse_damaged
from shards.schema import SAMPLE_RATE_HZ, TRAIN, Utterance
from shards.workers import Reader

ROOT = Path(__file__).parents[2]

# Without it, every large tensor begins with page faults, which are several times as dear as what is done with it.
MALLOC = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967295",
    "OMP_NUM_THREADS": "1",
}
BATCH_SECONDS = 160.0
TOLERANCE = 1e-5
NOISE_RECORDINGS, NOISE_SECONDS = 300, (2.0, 16.0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pack", type=Path, help="a packed folder; its training utterances are read")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        packed, source = (options.pack, str(options.pack)) if options.pack else pack(Path(folder))
        sys.stdout.write(json.dumps({"source": source, **measure(packed, options.rounds)}) + "\n")


def measure(packed: Path, rounds: int) -> dict[str, Any]:
    extractor = WhisperFeatureExtractor(feature_size=128)
    batches = batches_of(list(read_utterances(packed, splits=[TRAIN])))
    seconds = sum(utterance.duration_seconds for batch in batches for utterance in batch)
    urls = [entry.path(packed) for entry in read_index(packed).shards if entry.name.startswith(TRAIN)]

    def ours() -> Iterator[Tensor]:
        with Reader(Shards(packed)) as reader:
            for found in reader.ahead(batches):
                yield packed_log_mels(refuse_damaged(found), extractor)

    def usual() -> Iterator[Tensor]:
        samples = iter(webdataset.WebDataset(urls, shardshuffle=False).decode(decode))
        for batch in batches:
            audios = [next(samples)["flac"] for _ in batch]
            inputs = extractor(
                audios, sampling_rate=SAMPLE_RATE_HZ, padding="longest", truncation=False, return_tensors="pt"
            )
            yield inputs["input_features"]

    def ours_alone() -> Iterator[Tensor]:
        for audios in decoded:
            yield packed_log_mels(audios, extractor)

    def one_by_one() -> Iterator[Tensor]:
        for audio_A in (audio_A for audios in decoded for audio_A in audios):
            inputs = extractor(
                audio_A, sampling_rate=SAMPLE_RATE_HZ, padding=False, truncation=False, return_tensors="pt"
            )
            yield inputs["input_features"]

    apart = max(largest_difference(*three) for three in zip(ours(), usual(), batches, strict=True))
    assert apart <= TOLERANCE, f"both must make the same log-mels, got some {apart} apart"
    decoded = [Shards(packed).read(batch) for batch in batches]
    return {
        "utterances": sum(map(len, batches)),
        "audio_seconds": round(seconds, 1),
        "largest_difference": apart,
        "rounds": rounds,
        "shards_to_inputs": compared(ours, usual, seconds, rounds),
        "log_mel_alone_to_one_by_one": compared(ours_alone, one_by_one, seconds, rounds),
        "load_average": os.getloadavg()[0],
    }


def compared(
    ours: Callable[[], Iterator[Tensor]], usual: Callable[[], Iterator[Tensor]], seconds: float, rounds: int
) -> dict[str, Any]:
    own, others = [], []
    for _ in range(rounds):
        own.append(processor_seconds(ours))
        others.append(processor_seconds(usual))
    ratios = [theirs / mine for mine, theirs in zip(own, others, strict=True)]
    return {
        "times_real_time": {"ours": round(seconds / np.median(own)), "usual": round(seconds / np.median(others))},
        "ratio": {"min": round(min(ratios), 3), "median": round(float(np.median(ratios)), 3)},
    }


def decode(key: str, data: bytes) -> Any:
    return soundfile.read(io.BytesIO(data), dtype="float32")[0] if key.endswith("flac") else None


def batches_of(utterances: Sequence[Utterance]) -> list[list[Utterance]]:
    """In the order of the tars: webdataset's pipeline has no other."""
    batches: list[list[Utterance]] = []
    room = 0.0
    for utterance in utterances:
        if room < utterance.duration_seconds:
            batches.append([])
            room = BATCH_SECONDS
        batches[-1].append(utterance)
        room -= utterance.duration_seconds
    return batches


def largest_difference(packed_MF: Tensor, padded_BMF: Tensor, batch: Sequence[Utterance]) -> float:
    """But for the last frame of each utterance, which padding makes look into silence instead of a reflection."""
    lengths = [num_frames(round(utterance.duration_seconds * SAMPLE_RATE_HZ)) for utterance in batch]
    return max(
        float((mel_MF - padded_MF[:, : mel_MF.shape[1]])[:, :-1].abs().max())
        for mel_MF, padded_MF in zip(packed_MF.split(lengths, dim=1), padded_BMF, strict=True)
    )


def processor_seconds(read: Callable[[], Iterator[Tensor]]) -> float:
    begun = time.process_time()
    for _ in read():
        pass
    return time.process_time() - begun


def pack(folder: Path) -> tuple[Path, str]:
    """Pack with the program; the packed folder, and what is in it."""
    speech = os.environ.get("QAD_SPEECH_DIR")
    inputs = f"{speech}/an4/manifest.jsonl" if speech else str(write_noise(folder / "noise"))
    config = folder / "config.yaml"
    config.write_text(
        f"run: {folder}/run\nmodel: {{path: unused}}\npack: {{inputs: ['{inputs}'], language: English, holdout: 0}}\n"
    )
    program = [sys.executable, str(ROOT / "launch" / "pack.py"), "--config", str(config)]
    subprocess.run(program, check=True, cwd=ROOT, stdout=sys.stderr)
    return folder / "run" / "pack", "AN4" if speech else "noise"


def write_noise(folder: Path) -> Path:
    """Swelling low-pass noise: as FLAC about as large as speech."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, seconds in enumerate(random.uniform(*NOISE_SECONDS, NOISE_RECORDINGS)):
        noise_A = random.normal(0, 0.1, round(seconds * SAMPLE_RATE_HZ))
        smooth_A = np.convolve(noise_A, np.hanning(12) / 6, mode="same")
        swell_A = np.sin(np.arange(len(smooth_A)) / 3000) ** 2
        soundfile.write(folder / f"{number:04d}.wav", smooth_A * swell_A, SAMPLE_RATE_HZ, subtype="PCM_16")
    return folder


if __name__ == "__main__":
    main()
