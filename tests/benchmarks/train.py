"""A program: what training brings, for three formats, several seeds and two recipes, on speakers nobody has heard.

    python -m tests.benchmarks.train --speech DIR --run FOLDER [--formats int8 w4a8 w3a8] [--seeds 3]
        [--presets qad released] [--set train.NAME=VALUE] [--at-once 2]

AN4 and the embedded digits, and beside their training splits speech of other speakers and languages without a word of
transcript (``fsdd``, ``samples_en``, ``samples_multilingual`` and ``longform`` below ``DIR``), are packed and labelled
by the embedded teacher as one run, in float32. Each format is quantized once, and trained from there by each recipe
with each seed, which decides the order of the data and the alteration of copies: every step is
``launch/quantize.py`` or ``launch/train.py`` with one rank and nothing sharded. What is finished is not done again.

Students answer the test utterances of AN4 and of the digits, whose speakers and voices are in no training split. KL is
from the teacher, per token of its own greedy responses; errors are of words, or of characters where a language is
scored so. Intervals are of 95 %, from 10,000 draws of utterances that all students share; where there are several seeds
they are of the mean over these. Beside the PTQ students stand ModelOpt's own: SmoothQuant calibrated on text alone for
INT8, as the released model was, and plain maximum calibration for formats of fewer bits.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml

from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.config import RunConfig, load_run
from qad_dist.pairing import load_student
from qad_dist.quant.state import fold_weights
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import DONE, STUDENT
from qad_dist.runtime.world import current_world, program_environment
from qad_dist.text.bootstrap import Interval, resample
from shards.index import read_utterances
from shards.schema import TEST
from tests.benchmarks.quantize import CPU, SEED, TEXT_ONLY, Outcome, Students, TestSet, say, told
from tests.benchmarks.read import MALLOC
from tests.helpers.launching import ROOT
from tests.helpers.qwen import ASSETS, NANO

SOURCES = ("an4", "digits")
UNLABELLED = ("fsdd", "samples_en", "samples_multilingual", "longform")
FORMATS = ("int8", "w4a8", "w3a8")
PRESETS = ("qad", "released")
TEACHER, PTQ = "teacher", "PTQ"
KL_ONLY = ("no_text", "runaway", "loop", "rate", "script")
"""Filters that leave an utterance its KL: a teacher that babbles still has distributions to learn."""

SETTINGS = {
    "model": {"path": str(NANO), "dtype": "float32"},
    "pack": {"holdout": 0, "max_audio_seconds": 6, "max_rejected_share": 0.5},
    "read": {"workers": 0},
    "label": {"splits": ["train", "heldout", "test"], "filters": {name: {"action": "kl_only"} for name in KL_ONLY}},
    "quantize": {"research": True, "calibration_utterances": 512, "micro_batch_tokens": 4096},
    "train": {
        "deepspeed": None,
        "micro_batch_tokens": 4096,
        "micro_batches_per_step": 1,
        "augment": {"copies": 2},
        "warmup_steps": 20,
        "final_learning_rate_share": 0.02,
        "evaluate_every": 100,
        "checkpoint_every": 200,
        "log_every": 50,
        "decode_utterances": 0,
        "preflight": False,
    },
}
"""Of all runs."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--speech", type=Path, required=True, help="the folder that holds an4/")
    arguments.add_argument("--run", type=Path, required=True, help="everything is kept here")
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--presets", nargs="+", default=list(PRESETS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--set", nargs="+", action="extend", default=[], metavar="train.NAME=VALUE")
    arguments.add_argument("--at-once", type=int, default=2, help="trainings side by side")
    options = arguments.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        program = [sys.executable, "-m", "tests.benchmarks.train", *sys.argv[1:]]
        os.execve(sys.executable, program, os.environ | MALLOC)
    torch.set_num_threads(1)
    configure_logging(current_world())
    config = write_config(options.speech.absolute(), options.run.absolute())
    base = ["run=" + str(options.run.absolute() / "labelled")]
    for stage in ("pack", "label"):
        start(stage, config, base)
    for name in options.formats:
        start("quantize", config, settings_of(config, name))
    trainings = [
        [*settings_of(config, name, preset, seed), *options.set]
        for seed in range(options.seeds)
        for name in options.formats
        for preset in options.presets
    ]
    with ThreadPoolExecutor(options.at_once) as threads:
        list(threads.map(lambda settings: start("train", config, settings), trainings))
    measure_all(config, options.formats, options.presets, options.seeds, options.set)


def write_config(speech: Path, folder: Path) -> Path:
    """The YAML of all runs, and a manifest of all recordings: those without a word of transcript are for training."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for source, parent in (*((name, speech) for name in (SOURCES[0], *UNLABELLED)), (SOURCES[1], ASSETS)):
        for line in (parent / source / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            is_scored = source in SOURCES
            kept = {
                "audio": str(parent / source / row["audio"]),
                "speaker": f"{source}-{row.get('speaker')}",
                "split": row["split"] if is_scored else "train",
                **({"text": row["text"], "language": row["language"]} if is_scored else {}),
            }
            lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file() or manifest.read_text() != "".join(lines):
        manifest.write_text("".join(lines))
    settings = {"run": str(folder), **SETTINGS, "pack": {**SETTINGS["pack"], "inputs": [str(manifest)]}}
    config = folder / "benchmark.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


def settings_of(config: Path, name: str, preset: str | None = None, seed: int = 0) -> list[str]:
    """Settings of a student; its run folder has what was done before as links."""
    folder = config.parent / (name if preset is None else f"{name}-{preset}-{seed}")
    folder.mkdir(exist_ok=True)
    earlier = {"pack": "labelled", "label": "labelled"} | ({"quantize": name} if preset is not None else {})
    for stage, origin in earlier.items():
        if not (folder / stage).is_symlink():
            (folder / stage).symlink_to(config.parent / origin / stage)
    settings = [f"run={folder}", f"quantize.format={name}"]
    return settings if preset is None else [*settings, f"train.preset={preset}", f"train.seed={seed}"]


def start(stage: str, config: Path, settings: Sequence[str]) -> None:
    """Run a stage in a process of its own, unless it has ended well."""
    run = load_run(config, list(settings))
    if (run.stage_folder(stage) / DONE).is_file():
        return
    environment = {**program_environment(run.folder, on_cpu=True, offline=True), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, f"launch/{stage}.py", "--config", str(config), "--set", *settings]
    with (run.folder / f"{stage}.log").open("w") as log:
        ended = subprocess.run(program, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        raise SystemExit(f"{run.folder / stage}.log: {stage} ended with {ended.returncode}")
    print(f"done: {stage} {' '.join(settings)}", file=sys.stderr, flush=True)


def measure_all(config: Path, formats: Sequence[str], presets: Sequence[str], seeds: int, given: Sequence[str]) -> None:
    labelled = load_run(config, [f"run={config.parent / 'labelled'}"])
    teacher = load_teacher(labelled.model, CPU)
    with open_reader(labelled) as reader:
        utterances = list(read_utterances(labelled.stage_folder("pack"), splits=[TEST]))
        sets = []
        for source in SOURCES:
            chosen = [one for one in utterances if (one.speaker or "").startswith(f"{source}-")]
            sets.append(TestSet(f"{source}, {len(chosen)} test utterances", chosen, teacher, reader))
        outcomes: dict[str, list[list[Outcome]]] = {TEACHER: [[one.measure(teacher)] for one in sets]}
        for name in formats:
            run = load_run(config, settings_of(config, name))
            students = Students(run, reader)
            floor = f"{name}: {TEXT_ONLY if name == 'int8' else 'ModelOpt, plain maximum'}"
            made = students.smoothquant(on_text=True) if name == "int8" else students.plain(run.quantize.format)
            fold_weights(made.model.model)
            outcomes[floor] = [[one.measure(made.model)] for one in sets]
            outcomes[f"{name}: {PTQ}"] = [[one.measure(student_of(run, "quantize"))] for one in sets]
            for preset in presets:
                trained = [
                    student_of(load_run(config, [*settings_of(config, name, preset, seed), *given]), "train")
                    for seed in range(seeds)
                ]
                outcomes[f"{name}: PTQ, trained ({preset})"] = [[one.measure(m) for m in trained] for one in sets]
                print(f"measured: {name} {preset}", file=sys.stderr, flush=True)
    for number, test_set in enumerate(sets):
        say_table(test_set, {name: found[number] for name, found in outcomes.items()})


def student_of(run: RunConfig, stage: str) -> AsrModel:
    student, _ = load_student(run, run.stage_folder(stage) / STUDENT, CPU)
    fold_weights(student.model)
    return student


def say_table(test_set: TestSet, outcomes: Mapping[str, list[Outcome]]) -> None:
    """One row a student: means over seeds, and each seed's KL."""
    names = [name for name in outcomes if name != TEACHER]
    kl = resample([mean([one.kl_U for one in outcomes[name]]) for name in names], test_set.tokens_U, seed=SEED)
    lengths = [counts.reference_length for counts in outcomes[TEACHER][0].counts]
    errors = [
        mean([np.array([counts.errors for counts in one.counts], np.float64) for one in outcomes[name]])
        for name in (TEACHER, *names)
    ]
    rates = resample(errors, lengths, seed=SEED)
    say(f"\n### {test_set.name}, {int(test_set.tokens_U.sum())} response tokens, {sum(lengths)} reference tokens\n")
    say("| | KL, 0.001 nats a token | each seed | % of ModelOpt's | % of PTQ's | top-1 % | errors % | beyond teacher |")
    say("|---|---|---|---|---|---|---|---|")
    say(f"| {TEACHER} | | | | | | {told(rates.rate(0), 100)} | |")
    for place, name in enumerate(names):
        group = [other for other in names if other.split(":")[0] == name.split(":")[0]]
        seeds = [float(one.kl_U.sum() / test_set.tokens_U.sum()) for one in outcomes[name]]
        agreement = (
            mean([one.agreements_U.astype(np.float64) for one in outcomes[name]]).sum() / test_set.tokens_U.sum()
        )
        shares: list[Interval | None] = [kl.ratio(place, names.index(other)) for other in group[:2]]
        cells = [
            told(kl.rate(place), 1000, digits=2),
            " ".join(f"{1000 * value:.2f}" for value in seeds) if len(seeds) > 1 else "",
            *(told(share, 100) for share in shares),
            f"{100 * agreement:.2f}",
            told(rates.rate(place + 1), 100),
            told(rates.difference(place + 1, 0), 100),
        ]
        say(f"| {name} | {' | '.join(cells)} |")


def mean(values: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.mean(np.stack(values), axis=0)


if __name__ == "__main__":
    main()
