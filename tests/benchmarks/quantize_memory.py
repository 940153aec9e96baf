"""A program: peak memory and time of quantizing a model of the real dimensions, split by the events of the stage's log.

    python -m tests.benchmarks.quantize_memory [--utterances 24] [--format int8] [--set NAME=VALUE ...]

Writes a checkpoint of Qwen3-ASR-0.6B's dimensions (28 decoder layers, 18 of the audio tower, a vocabulary of 151,936)
with random weights in bfloat16, packs clips of 5 to 30 s made of spoken digits, and writes label files with responses
of plausible length: decoding with such weights says nothing. Then ``launch/quantize.py`` runs as a process of its own,
one rank with one thread on the CPU, and is watched from outside.

``SETTINGS`` is what differs from the defaults; ``--set`` changes more. The table has a row for each stretch between two
events of the log, with the largest resident memory in it: anonymous, and of mapped files, which are libraries and,
while it loads, the checkpoint. The line of JSON behind it has the peak as the kernel counts it, which is to be at most
6 GB.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from qad_dist.asr.checkpoint import EMBEDDING, HEAD, WEIGHTS_FILE, load_processor
from qad_dist.asr.load import PROCESSOR_FILES
from qad_dist.config import RunConfig, load_run
from qad_dist.labelling import Labelling
from qad_dist.runtime.record import finish_stage
from shards.labels import label_path, write_labels
from shards.schema import ENDED_BY_END_TOKEN, SAMPLE_RATE_HZ, PseudoLabel, Utterance
from tests.benchmarks.label import AUDIO_TOWER, DECODER, MORE_TOKENS, TOKENS_PER_SECOND
from tests.helpers.launching import ROOT, run_python
from tests.helpers.qwen import NANO, digit_mixes

MOST_BYTES = 6e9
NUM_DECODER_LAYERS, NUM_TOWER_LAYERS = 28, 18
SECONDS, NUM_HELDOUT = (5.0, 30.0), 6
SETTINGS = {
    "label.max_response_tokens": 32,  # of the clips that the stage makes: random weights never end a response
    "quantize.search_rows": 512,
    "quantize.evaluate_utterances": NUM_HELDOUT,
    "quantize.sensitivity_utterances": 0,
}
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Seen:
    """Resident bytes at a moment, and processor seconds up to then."""

    time: float
    processor_seconds: float
    anonymous: int
    of_files: int
    most: int
    """Of the process up to now, as the kernel counts it."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--utterances", type=int, default=24, help="to calibrate on")
    arguments.add_argument("--format", default="int8")
    arguments.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as of the programs")
    options = arguments.parse_args()
    overrides = [f"{name}={value}" for name, value in SETTINGS.items()]
    overrides += [f"quantize.format={options.format}", "quantize.research=true", *options.set]
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), overrides, num_utterances=options.utterances)
        told = measure(config, overrides)
    say(json.dumps({"format": options.format, "utterances": options.utterances, "settings": overrides, **told}))


def prepare(folder: Path, overrides: Sequence[str], *, num_utterances: int) -> Path:
    """Checkpoint, packed clips and labels; returns the config."""
    seconds = np.random.default_rng(0).uniform(*SECONDS, num_utterances + NUM_HELDOUT).tolist()
    entries = []
    for number, audio_A in enumerate(digit_mixes(seconds)):
        soundfile.write(folder / f"{number:04d}.flac", audio_A, SAMPLE_RATE_HZ)
        split = "train" if number < num_utterances else "heldout"
        entries.append({"audio": f"{number:04d}.flac", "language": "English", "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    values = {
        "run": str(folder / "run"),
        "model": {"path": str(write_model(folder / "model")), "dtype": "bfloat16"},
        "pack": {"inputs": [str(folder / "manifest.jsonl")], "holdout": 0, "processes": 1},
        "read": {"workers": 0},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    packed = run_python("launch/pack.py", "--config", config, folder=folder / "output")
    assert packed.code == 0, packed.stderr
    write_label_files(load_run(config, list(overrides)))
    return config


def write_model(folder: Path) -> Path:
    """Random bfloat16 weights behind the embedded teacher's tokenizer, the tied head stored twice as on the hub."""
    folder.mkdir()
    for name in PROCESSOR_FILES:
        if (NANO / name).is_file():
            (folder / name).write_bytes((NANO / name).read_bytes())
    values = json.loads((NANO / "config.json").read_text())
    values["thinker_config"]["text_config"] |= DECODER | {"num_hidden_layers": NUM_DECODER_LAYERS}
    layers = {"encoder_layers": NUM_TOWER_LAYERS, "num_hidden_layers": NUM_TOWER_LAYERS}
    values["thinker_config"]["audio_config"] |= AUDIO_TOWER | layers | {"output_dim": DECODER["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    state = model.state_dict()
    save_file(state | {HEAD: state[EMBEDDING].clone()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def write_label_files(run: RunConfig) -> None:
    """As the label stage leaves them."""
    labelling = Labelling(run)
    tokenizer = load_processor(Path(run.model.path)).tokenizer
    begin_ids, end_ids = (tokenizer(text)["input_ids"] for text in ("language English<asr_text>", "<|im_end|>"))
    for shard, task in labelling.tasks.items():
        labels = [label_of(utterance, begin_ids, end_ids) for utterance in task.utterances]
        write_labels(label_path(labelling.folder, shard), labelling.header(shard), labels)
        labelling.judge(labelling.read_first(shard))
    finish_stage(run, "label", results={})


def label_of(utterance: Utterance, begin_ids: Sequence[int], end_ids: Sequence[int]) -> PseudoLabel:
    """An English response of as many tokens as speech has."""
    num_words = round(TOKENS_PER_SECOND * utterance.duration_seconds) + MORE_TOKENS - len(begin_ids) - len(end_ids)
    ids = (*begin_ids, *range(300, 300 + num_words), *end_ids)
    return PseudoLabel(
        key=utterance.key,
        token_ids=ids,
        text=" ".join(f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}bel" for n in range(num_words // 2)),
        language="English",
        token_logprobs=(-0.1,) * len(ids),
        mean_logprob=-0.1,
        ended_by=ENDED_BY_END_TOKEN,
        duration_seconds=utterance.duration_seconds,
    )


def measure(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the stage and watch it; prints the table and returns what it says in short."""
    program = [sys.executable, "launch/quantize.py", "--config", str(config)]
    program += [word for override in overrides for word in ("--set", override)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    seen: list[Seen] = []
    events: list[tuple[float, str]] = []
    begun = time.monotonic()
    with subprocess.Popen(program, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        watching = threading.Thread(target=watch, args=(process, seen))
        watching.start()
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if event := re.search(r"\bevent=(\w+)", line):
                events.append((time.monotonic(), event[1]))
        watching.join()
    assert process.returncode == 0, f"the stage must succeed, got {process.returncode}"
    events.append((time.monotonic(), "end"))
    say("| until | seconds | of processor | anonymous, GB | of files, GB | together, GB |\n|---|---|---|---|---|---|")
    start = begun
    for name, stretch in groupby(events, key=lambda event: event[1]):
        *_, (end, _) = stretch
        say(row(name, end - start, [moment for moment in seen if start <= moment.time < end]))
        start = end
    most = seen[-1].most
    return {
        "peak_gb": round(most / 1e9, 2),
        "is_enough": most <= MOST_BYTES,
        "seconds": round(events[-1][0] - begun),
        "processor_seconds": round(seen[-1].processor_seconds),
        "load_average": os.getloadavg()[0],
    }


def watch(process: subprocess.Popen[str], seen: list[Seen]) -> None:
    """Look until the process ends."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        kilobytes = dict(re.findall(r"^(VmHWM|RssAnon|RssFile):\s+(\d+) kB$", status, re.MULTILINE))
        if kilobytes:  # none when it has just ended
            anonymous, of_files, most = (1024 * int(kilobytes[name]) for name in ("RssAnon", "RssFile", "VmHWM"))
            user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            spent = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            seen.append(Seen(time.monotonic(), spent, anonymous, of_files, most))
        time.sleep(POLL_SECONDS)


def row(name: str, seconds: float, seen: Sequence[Seen]) -> str:
    """Largest values of a stretch; the last need not be the sum of the two before."""
    spent = seen[-1].processor_seconds - seen[0].processor_seconds if seen else 0.0
    anonymous, of_files, together = (
        max((get(moment) for moment in seen), default=0) / 1e9
        for get in (lambda m: m.anonymous, lambda m: m.of_files, lambda m: m.anonymous + m.of_files)
    )
    return f"| {name} | {seconds:.0f} | {spent:.0f} | {anonymous:.2f} | {of_files:.2f} | {together:.2f} |"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
