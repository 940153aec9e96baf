"""A program: what training brings, for several formats and seeds and two recipes, on speakers nobody has heard.

    python -m tests.benchmarks.voices VOICES --digits 200 --letters 3000
    python -m tests.benchmarks.train --speech DIR --run FOLDER --voices VOICES [--seeds 3]
        [--formats int8 int8_dynamic w4a8 w3a8] [--presets qad released] [--released-seeds 3]
        [--set train.NAME=VALUE] [--at-once 2] [--ablate]

AN4 and the embedded digits are packed, and beside their training splits speech of other speakers, voices and
languages without a word of transcript (``fsdd``, ``samples_en``, ``samples_multilingual`` and ``longform`` below
``DIR``, and what ``VOICES`` holds). Splices are made of AN4 and digits, and the embedded teacher labels all of it as
one run, in float32. Each format is quantized once, and trained from there by each recipe with each seed,
which decides the order of the data: every step is ``launch/quantize.py`` or ``launch/train.py`` with one rank and
nothing sharded. What is finished is not done again. ``--ablate`` trains one format by parts of the recipe instead.

Students answer the test utterances of AN4 and of the digits, whose speakers and voices are in no training split. KL is
from the teacher, per token of its own greedy responses; errors are of words, or of characters where a language is
scored so. Intervals are of 95 %, from 10,000 draws of utterances that all students share; where there are several seeds
they are of the mean over these. Beside the PTQ students stand ModelOpt's own: SmoothQuant calibrated on text alone for
static INT8, as the released model was, and plain maximum calibration for formats of fewer bits.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
from shards.schema import TEST, TRAIN
from shards.workers import Reader
from tests.benchmarks.quantize import CPU, SEED, TEXT_ONLY, Outcome, Students, TestSet, say, told
from tests.benchmarks.read import MALLOC
from tests.helpers.launching import ROOT
from tests.helpers.qwen import ASSETS, NANO

SOURCES = ("an4", "digits")
UNLABELLED = ("fsdd", "samples_en", "samples_multilingual", "longform")
PRESETS = ("qad", "released")
"""What is trained with."""


class Recipe(NamedTuple):
    steps: int
    learning_rate: float
    """At its peak; the fewer the bits, the further a weight must go."""
    calibration_sources: tuple[str, ...] = ()
    """All where empty: few bits overfit what they are calibrated on, as ranges of 8 bits hardly do."""


RECIPES = {
    "int8": Recipe(200, 3e-5, SOURCES),
    "int8_dynamic": Recipe(200, 3e-5, SOURCES),
    "w4a8": Recipe(1200, 1.5e-4),
    "w3a8": Recipe(1000, 2.5e-4),
}
"""By format."""
EIGHT_BITS = ("int8", "int8_dynamic")
"""Formats that stand beside the released model's, ModelOpt's static INT8."""
ABLATED, SHORT = "w4a8", 300
"""Format and steps of an ablation."""
LITTLE = "train.sources=[an4, digits]"
VARIANTS = {
    "AN4 and digits": [LITTLE],
    "and two altered copies of each": [LITTLE, "train.augment.copies=2"],
    "and other speech instead": ["train.sources={others}"],
    "and splices (qad)": [],
    "and hidden states": ["train.hidden_weight=1"],
    "released": ["train.preset=released"],
}
"""Each adds to the one before, but for the last, which has all the data."""
PACKED, LABELLED = "packed", "labelled"
TEACHER, PTQ = "teacher", "PTQ"
KL_ONLY = ("no_text", "runaway", "loop", "rate", "script")
"""Filters that leave an utterance its KL: a teacher that babbles still has distributions to learn."""

SETTINGS = {
    "model": {"path": str(NANO), "dtype": "float32"},
    "pack": {"holdout": 0, "max_audio_seconds": 8, "max_rejected_share": 0.5},
    "read": {"workers": 0},
    "label": {"splits": ["train", "heldout", "test"], "filters": {name: {"action": "kl_only"} for name in KL_ONLY}},
    "quantize": {"research": True, "micro_batch_tokens": 4096},
    "train": {
        "deepspeed": None,
        "micro_batch_tokens": 4096,
        "micro_batches_per_step": 1,
        "warmup_steps": 20,
        "final_learning_rate_share": 0.02,
        "evaluate_every": 100,
        # The held-out speakers of AN4 are the teacher's own: whoever is nearest to it there need not be elsewhere.
        "keep": "last",
        "checkpoint_every": 400,
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
    arguments.add_argument("--voices", type=Path, help="what tests.benchmarks.voices made, to be learned from, too")
    arguments.add_argument("--splices", type=int, default=30_000, help="utterances made of pieces of others")
    arguments.add_argument("--formats", nargs="+", default=list(RECIPES))
    arguments.add_argument("--presets", nargs="+", default=list(PRESETS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--released-seeds", type=int, help="of the released recipe, if not as many")
    arguments.add_argument("--set", nargs="+", action="extend", default=[], metavar="train.NAME=VALUE")
    arguments.add_argument("--ablate", action="store_true", help="instead: what each part of the recipe brings")
    arguments.add_argument("--at-once", type=int, default=2, help="trainings side by side")
    options = arguments.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        program = [sys.executable, "-m", "tests.benchmarks.train", *sys.argv[1:]]
        os.execve(sys.executable, program, os.environ | MALLOC)
    torch.set_num_threads(1)
    configure_logging(current_world())
    config = write_configs(options.speech.absolute(), options.run.absolute(), options.voices, options.splices)
    start("pack", config.with_stem(PACKED))
    if options.splices:
        start("pack", config.with_stem(PACKED), command="splice")
    for stage in ("pack", "label"):
        start(stage, config)
    for name in options.formats:
        start("quantize", config, settings_of(config, name))
    if options.ablate:
        ablate(config, options.at_once)
        return
    seeds = dict.fromkeys(options.presets, options.seeds)
    if "released" in seeds and options.released_seeds is not None:
        seeds["released"] = options.released_seeds
    trainings = [
        [*settings_of(config, name, preset, seed), *options.set]
        for seed in range(max(seeds.values()))
        for name in options.formats
        for preset in seeds
        if seed < seeds[preset]
    ]
    with ThreadPoolExecutor(options.at_once) as threads:
        list(threads.map(lambda settings: start("train", config, settings), trainings))
    measure_all(config, options.formats, seeds, options.set)


def write_configs(speech: Path, folder: Path, voices: Path | None, splices: int) -> Path:
    """The YAML of the labelled run, and beside it that of what is packed first, of a manifest for each source.

    Recordings without a word of transcript are for training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [*((name, speech) for name in (SOURCES[0], *UNLABELLED)), (SOURCES[1], ASSETS)]
    if voices is not None:
        places.append((voices.name, voices.absolute().parent))
    inputs = []
    for source, parent in places:
        lines = []
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
        manifest = folder / "sources" / source / "manifest.jsonl"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text("".join(lines))
        inputs.append(str(manifest))
    pack = SETTINGS["pack"] | {"inputs": inputs}
    write(folder / PACKED, pack, splice={"utterances": max(1, splices), "sources": list(SOURCES)})
    packed = [str(folder / PACKED / stage) for stage in ("pack", *(["splice"] if splices else []))]
    return write(folder / LABELLED, SETTINGS["pack"] | {"inputs": packed, "in_place": True})


def write(folder: Path, pack: dict[str, object], **more: object) -> Path:
    """A run's YAML, beside its folder."""
    folder.mkdir(exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**SETTINGS, "run": str(folder), "pack": pack, **more}))
    return config


def settings_of(config: Path, name: str, preset: str | None = None, seed: int = 0) -> list[str]:
    """Settings of a student; its run folder has what was done before as links."""
    folder = config.parent / (name if preset is None else f"{name}-{preset}-{seed}")
    folder.mkdir(exist_ok=True)
    earlier = {"pack": LABELLED, "label": LABELLED} | ({"quantize": name} if preset is not None else {})
    for stage, origin in earlier.items():
        if not (folder / stage).is_symlink():
            (folder / stage).symlink_to(config.parent / origin / stage)
    recipe = RECIPES[name]
    sources = f"quantize.calibration_sources=[{', '.join(recipe.calibration_sources)}]"
    settings = [f"run={folder}", f"quantize.format={name}", sources]
    if preset is None:
        return settings
    settings += [f"train.seed={seed}", f"train.steps={recipe.steps}", f"train.learning_rate={recipe.learning_rate}"]
    return [*settings, f"train.preset={preset}"] if preset in PRESETS else settings


def start(stage: str, config: Path, settings: Sequence[str] = (), *, command: str = "run") -> None:
    """Run a stage in a process of its own, unless it has ended well."""
    run = load_run(config, list(settings))
    name = stage if command == "run" else command
    if command == "run" and (run.stage_folder(stage) / DONE).is_file():
        return  # other commands keep what they made themselves
    environment = {**program_environment(run.folder, on_cpu=True, offline=True), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, f"launch/{stage}.py", *([command] if command != "run" else []), "--config", str(config)]
    with (run.folder / f"{name}.log").open("w") as log:
        ended = subprocess.run(
            [*program, *(["--set", *settings] if settings else [])],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode:
        raise SystemExit(f"{run.folder / name}.log: {name} ended with {ended.returncode}")
    print(f"done: {name} {' '.join(settings)}", file=sys.stderr, flush=True)


def ablate(config: Path, at_once: int) -> None:
    """Train one format with one seed by every variant of the recipe, and print what is left of its KL."""
    others = [name for name in sources_of(config) if name != "splice"]
    trainings = {}
    start("quantize", config, settings_of(config, ABLATED))
    for number, (name, given) in enumerate(VARIANTS.items()):
        settings = settings_of(config, ABLATED, f"variant{number}")
        chosen = [one.format(others=f"[{', '.join(others)}]") for one in given]
        trainings[name] = [*settings, f"train.steps={SHORT}", *chosen]
    with ThreadPoolExecutor(at_once) as threads:
        list(threads.map(lambda settings: start("train", config, settings), trainings.values()))
    with tests_of(config) as (sets, teacher, reader):
        outcomes = {
            TEACHER: [[one.measure(teacher)] for one in sets],
            **measure_untrained(config, ABLATED, sets, reader),
        }
        for name, settings in trainings.items():
            student = student_of(load_run(config, settings), "train")
            outcomes[f"{ABLATED}: {name}"] = [[one.measure(student)] for one in sets]
    for number, test_set in enumerate(sets):
        say_table(test_set, {name: found[number] for name, found in outcomes.items()})


def sources_of(config: Path) -> list[str]:
    """Sources of the speech to train on."""
    table = read_utterances(load_run(config).stage_folder("pack"), splits=[TRAIN])
    return sorted(str(name) for name in table.codes("source")[1])


@contextmanager
def tests_of(config: Path) -> Generator[tuple[list[TestSet], AsrModel, Reader]]:
    """Both test sets, behind the teacher."""
    labelled = load_run(config)
    teacher = load_teacher(labelled.model, CPU)
    with open_reader(labelled) as reader:
        utterances = list(read_utterances(labelled.stage_folder("pack"), splits=[TEST]))
        sets = []
        for source in SOURCES:
            chosen = [one for one in utterances if one.source == source]
            sets.append(TestSet(f"{source}, {len(chosen)} test utterances", chosen, teacher, reader))
        yield sets, teacher, reader


def measure_all(config: Path, formats: Sequence[str], seeds: Mapping[str, int], given: Sequence[str]) -> None:
    """Print what PTQ and all trained students make of the tests; ``seeds`` says how many a preset has."""
    with tests_of(config) as (sets, teacher, reader):
        outcomes: dict[str, list[list[Outcome]]] = {TEACHER: [[one.measure(teacher)] for one in sets]}
        for name in formats:
            outcomes |= measure_untrained(config, name, sets, reader)
            for preset, count in seeds.items():
                trained = [
                    student_of(load_run(config, [*settings_of(config, name, preset, seed), *given]), "train")
                    for seed in range(count)
                ]
                outcomes[f"{name}: PTQ, trained ({preset})"] = [[one.measure(m) for m in trained] for one in sets]
                print(f"measured: {name} {preset}", file=sys.stderr, flush=True)
    for number, test_set in enumerate(sets):
        say_table(test_set, {name: found[number] for name, found in outcomes.items()})


def measure_untrained(
    config: Path, name: str, sets: Sequence[TestSet], reader: Reader
) -> dict[str, list[list[Outcome]]]:
    """ModelOpt's student of a format, and this project's before training: what all shares are of, in this order."""
    run = load_run(config, settings_of(config, name))
    students = Students(run, reader)
    is_int8 = name in EIGHT_BITS
    made = students.smoothquant(on_text=True) if is_int8 else students.plain(run.quantize.format)
    fold_weights(made.model.model)
    own = student_of(run, "quantize")
    return {
        f"{name}: {TEXT_ONLY if is_int8 else 'ModelOpt, plain maximum'}": [[one.measure(made.model)] for one in sets],
        f"{name}: {PTQ}": [[one.measure(own)] for one in sets],
    }


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
