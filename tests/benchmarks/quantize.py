"""A program: how far students are from their teacher, calibrated by this project, by ModelOpt, and on text alone.

    python -m tests.benchmarks.quantize --speech DIR [--run FOLDER] [--set quantize.NAME=VALUE]

AN4 (``DIR/an4``) and the embedded digits are packed and labelled by the embedded teacher as one run, in float32, with
one thread. Each student is calibrated on the same utterances of its training split, and then answers the test
utterances of both. Beside this project's formats stand

* ModelOpt's ``INT8_SMOOTHQUANT_CFG`` as it is, but for the audio tower, which is left alone here as everywhere;
* the same, calibrated on the bare texts of the same responses: no prompt, no audio, no language and no end token;
* 4-bit formats as ModelOpt's plain maximum calibration makes them.

KL is from the teacher, per token of its own greedy responses; rates are of errors in words, or in characters where a
language is scored so. Intervals are of 95 %, from 10,000 draws of utterances that all students share. Two tables, the
alphas that were chosen, and the claims with what became of them are written to stdout. ``--run`` keeps the labelled
run for another time.
"""

import argparse
import copy
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor

from qad_dist.asr.attention import Segments
from qad_dist.asr.collate import Example, collate
from qad_dist.asr.dataset import mels_ahead
from qad_dist.asr.decoder import DecoderStack
from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.asr.made_clips import make_clips
from qad_dist.asr.transcribe import transcribe
from qad_dist.calibration import CalibrationData
from qad_dist.calibration_set import choose_calibration
from qad_dist.config import RunConfig, load_run
from qad_dist.distill.loss import row_metrics
from qad_dist.formats import FORMATS, FormatName
from qad_dist.heldout import CHUNK_ROWS
from qad_dist.linears import LINEARS
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import Calibration, GroupKey, SmoothedGroup
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.state import Quantization, check_quantizers, enabled_quantizers, fold_weights
from qad_dist.quant.walk import WalkBatch, final_hidden
from qad_dist.runtime.logs import configure_logging, prints_as_debug
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.world import current_world
from qad_dist.stages import label, pack
from qad_dist.text.bootstrap import Interval, Resampled, resample
from qad_dist.text.wer import ErrorCounts, count_errors
from shards.index import read_utterances
from shards.plan import plan_decoding
from shards.schema import TEST, Utterance
from shards.workers import Reader
from tests.benchmarks.read import MALLOC
from tests.helpers.qwen import ASSETS, NANO

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
SEED = 0
RESPONSE_TOKENS, TEST_BATCH_SECONDS = 448, 160.0
SOURCES = ("an4", "digits")
"""The corpora, by the names of their folders."""
TEXT_TOKENS = 4096
"""Of one batch of bare texts."""

TEACHER, OURS, DYNAMIC, W4A8 = "teacher", "int8", "int8_dynamic", "w4a8"
UNSMOOTHED = "int8, not smoothed"
SMOOTHQUANT, TEXT_ONLY = "ModelOpt SmoothQuant", "ModelOpt SmoothQuant, calibrated on text alone"
PLAIN = "{}, plain maximum"

MOST_OF_TEXT_ONLY, MOST_OF_PLAIN, AIM_OF_SMOOTHQUANT = 0.05, 0.70, 0.70


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one model made of the utterances of a test set."""

    counts: list[ErrorCounts]
    kl_U: npt.NDArray[np.float64]
    agreements_U: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A quantized model, and the scales that were searched for it, if they were."""

    model: AsrModel
    smoothed: Mapping[GroupKey, SmoothedGroup]


class TestSet:
    """Test utterances with the teacher's responses, behind embeddings and audio tower, which all students share."""

    __test__ = False  # no test for pytest

    def __init__(self, name: str, utterances: Sequence[Utterance], teacher: AsrModel, reader: Reader) -> None:
        seconds = [utterance.duration_seconds for utterance in utterances]
        batches = plan_decoding(seconds, batch_audio_seconds=TEST_BATCH_SECONDS)
        self.name = name
        self._utterances = [[utterances[place] for place in places] for places in batches]
        self._mels = list(mels_ahead(reader, self._utterances, teacher.extractor))
        self._teacher = teacher
        self._batches: list[WalkBatch] = []
        self._lengths: list[list[int]] = []
        for number, mels in enumerate(self._mels):
            responses = [one.token_ids for one in transcribe(teacher, mels, max_response_tokens=RESPONSE_TOKENS)]
            examples = [Example(key="", mel_MF=m, response_ids=ids) for m, ids in zip(mels, responses, strict=True)]
            packed = collate(examples, prompt=teacher.prompt)
            self._batches.append(walk_batch(teacher, packed, number=number, is_search=False))
            self._lengths.append([len(ids) for ids in responses])
        self._states = [self._states_of(batch, teacher) for batch in self._batches]
        self.tokens_U = np.concatenate([np.array(lengths) for lengths in self._lengths])

    def measure(self, model: AsrModel) -> Outcome:
        """Distances on the teacher's responses, and errors of the model's own."""
        kl, agreements = [], []
        for batch, exact_RD, lengths in zip(self._batches, self._states, self._lengths, strict=True):
            nothing_R = torch.zeros(len(exact_RD), dtype=torch.int64)
            rows = row_metrics(
                *(self._states_of(batch, model), exact_RD, self._teacher.head_weight_VD, nothing_R),
                chunk_rows=CHUNK_ROWS,
            )
            kl += [float(part.double().sum()) for part in rows.kl_R.split(lengths)]
            agreements += [int(part.sum()) for part in rows.agrees_R.split(lengths)]
        counts = [
            count_errors(utterance.reference or "", hypothesis.text, language=utterance.language)
            for utterances, mels in zip(self._utterances, self._mels, strict=True)
            for utterance, hypothesis in zip(
                utterances, transcribe(model, mels, max_response_tokens=RESPONSE_TOKENS), strict=True
            )
        ]
        return Outcome(counts=counts, kl_U=np.array(kl), agreements_U=np.array(agreements))

    def _states_of(self, batch: WalkBatch, model: AsrModel) -> Tensor:
        with torch.no_grad():
            return self._teacher.decoder.norm(final_hidden(batch, model.decoder.layers).index_select(0, batch.rows_R))


class Students:
    """Makes students of one teacher, calibrated on the same utterances."""

    def __init__(self, run: RunConfig, reader: Reader) -> None:
        self._run = run
        chosen = choose_calibration(run)
        teacher = load_teacher(run.model, CPU)
        silent, long = (chosen.missing_silent, chosen.missing_long) if run.quantize.make_clips else (0, 0)
        made = make_clips(teacher, chosen.joinable, reader=reader, silent=silent, long=long, settings=run.label)
        self._data = CalibrationData(run, chosen, made, reader, current_world())
        # Not those of clips that were made: a teacher that hears nothing may write tags as text, and none belongs here.
        answers = [response for _, response in chosen.rows]
        texts = [teacher.prompt.parse(r.token_ids.tolist(), language=r.prompt_language)[0] for r in answers]
        self._texts = [text for text in texts if text]
        self.told = (
            f"Calibrated on {len(chosen.rows)} utterances of {chosen.num_languages} languages and {len(made)} clips "
            f"that were made ({silent} silent, {long} long); on text alone: on the texts of these utterances."
        )

    def ours(self, name: FormatName, **settings: Any) -> Student:
        """As the stage makes them, before they are written."""
        student = load_teacher(self._run.model, CPU)
        section = self._run.quantize.model_copy(update={"format": name, **settings})
        layers = student.decoder.layers
        calibration = Calibration(student.model, layers, section, self._data.source(student))
        use_fast_fake_quant(student.model)
        smoothed = calibration.run(torch.float32)
        check_quantizers(student.model, Quantization(format=name, num_layers=len(layers)))
        return Student(model=student, smoothed=smoothed)

    def plain(self, name: FormatName) -> Student:
        """The same format by ModelOpt's ``max``: nothing is smoothed, clipped or corrected."""
        student = load_teacher(self._run.model, CPU)
        run_all = self._data.source(student).run_all
        config = {**modelopt_config(FORMATS[name], group_size=self._run.quantize.group_size), "algorithm": "max"}
        with prints_as_debug(log):
            mtq.quantize(student.model, config, forward_loop=lambda _: run_all())
        check_quantizers(student.model, Quantization(format=name, num_layers=len(student.decoder.layers)))
        return Student(model=student, smoothed={})

    def smoothquant(self, *, on_text: bool) -> Student:
        """ModelOpt's own, by its own algorithm and its own code."""
        student = load_teacher(self._run.model, CPU)
        run_all = self._data.source(student).run_all
        config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
        config["quant_cfg"].append({"quantizer_name": "*audio_tower*", "enable": False})
        with prints_as_debug(log):
            mtq.quantize(student.model, config, lambda _: self._run_texts(student) if on_text else run_all())
        smoothed = [name for name, one in enabled_quantizers(student.model) if one.pre_quant_scale is not None]
        expected = len(LINEARS) * len(student.decoder.layers)
        assert len(smoothed) == expected, f"ModelOpt must smooth {expected} Linears, got {smoothed}"
        return Student(model=student, smoothed={})

    @torch.no_grad()
    def _run_texts(self, student: AsrModel) -> None:
        decoder, tokenizer = student.decoder, student.prompt.tokenizer
        waiting = [tokenizer(text)["input_ids"] for text in self._texts]
        while waiting:
            ends = np.cumsum([len(ids) for ids in waiting])
            count = max(1, int((ends <= TEXT_TOKENS).sum()))
            lengths = torch.tensor([len(ids) for ids in waiting[:count]])
            hidden_ND = decoder.embed_tokens(torch.tensor([one for ids in waiting[:count] for one in ids]))
            positions_1N = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
            cos_1NE, sin_1NE = decoder.rotary_emb(hidden_ND, positions_1N)
            segments = Segments.from_lengths(lengths, causal=True, device=CPU)
            DecoderStack(decoder.layers)(hidden_ND, cos_1NE, sin_1NE, segments)
            waiting = waiting[count:]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--speech", type=Path, required=True, help="the folder that holds an4/")
    arguments.add_argument("--run", type=Path, help="keep the labelled run here, or take it from here")
    arguments.add_argument("--set", action="append", default=[], metavar="quantize.NAME=VALUE")
    options = arguments.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        program = [sys.executable, "-m", "tests.benchmarks.quantize", *sys.argv[1:]]
        os.execve(sys.executable, program, os.environ | MALLOC)
    torch.set_num_threads(1)
    configure_logging(current_world())
    with tempfile.TemporaryDirectory() as folder:
        run = labelled_run(options.speech, options.run or Path(folder) / "run", options.set)
        with open_reader(run) as reader:
            measure_all(run, reader)


def labelled_run(speech: Path, folder: Path, overrides: Sequence[str]) -> RunConfig:
    """Pack and label both corpora, unless that was done."""
    folder.mkdir(parents=True, exist_ok=True)
    manifests = [parent / source / "manifest.jsonl" for parent, source in zip((speech, ASSETS), SOURCES, strict=True)]
    settings = {
        "run": str(folder),
        "model": {"path": str(NANO), "dtype": "float32"},
        "pack": {"inputs": [str(path.absolute()) for path in manifests], "holdout": 0, "processes": 1},
        "read": {"workers": 0},
    }
    config = folder / "benchmark.yaml"
    config.write_text(yaml.safe_dump(settings))
    run = load_run(config, list(overrides))
    with redirect_stdout(sys.stderr):
        pack.run(run)
        label.run(run)
    return run


def measure_all(run: RunConfig, reader: Reader) -> None:
    """Make one student after the other, measure it on both sets, and give it up; then print what was found."""
    teacher = load_teacher(run.model, CPU)
    utterances = list(read_utterances(run.stage_folder("pack"), splits=[TEST]))
    chosen = {source: [one for one in utterances if one.source == source] for source in SOURCES}
    sets = [TestSet(f"{name}, {len(some)} test utterances", some, teacher, reader) for name, some in chosen.items()]
    students = Students(run, reader)
    outcomes = {TEACHER: [one.measure(teacher) for one in sets]}
    assert not any(found.kl_U.any() for found in outcomes[TEACHER]), "the teacher must be at no distance to itself"
    seconds, searched = {}, {}
    for name, make in makers(students).items():
        begun = time.process_time()
        student = make()
        seconds[name] = time.process_time() - begun
        if student.smoothed:
            searched[name] = student.smoothed
        # Weights that are quantized once are those that each forward would make of them, only sooner.
        fold_weights(student.model.model)
        outcomes[name] = [one.measure(student.model) for one in sets]
        del student  # before the next one is made
        print(f"{name}: calibrated in {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    say(students.told)
    kl_by_set = {}
    for number, test_set in enumerate(sets):
        kl_by_set[test_set.name] = say_table(test_set, {name: found[number] for name, found in outcomes.items()})
    say_alphas(searched)
    say("Processor seconds of calibration: " + ", ".join(f"{name} {taken:.0f}" for name, taken in seconds.items()))
    for claim in claims(kl_by_set, list(seconds)):
        say(claim)


def makers(students: Students) -> dict[str, Callable[[], Student]]:
    """Students by name, in the order of the tables."""
    return {
        UNSMOOTHED: lambda: students.ours("int8", alpha="none", clip="none"),
        SMOOTHQUANT: lambda: students.smoothquant(on_text=False),
        TEXT_ONLY: lambda: students.smoothquant(on_text=True),
        OURS: lambda: students.ours("int8"),
        DYNAMIC: lambda: students.ours("int8_dynamic"),
        "int8_weight_only": lambda: students.ours("int8_weight_only"),
        PLAIN.format(W4A8): lambda: students.plain("w4a8"),
        W4A8: lambda: students.ours("w4a8"),
        PLAIN.format("int4_weight_only"): lambda: students.plain("int4_weight_only"),
        "int4_weight_only": lambda: students.ours("int4_weight_only"),
        "fp8": lambda: students.ours("fp8"),
    }


def say_table(test_set: TestSet, outcomes: Mapping[str, Outcome]) -> Resampled:
    """Print the table of a set; returns the KL of all models on the same draws, the teacher's left out."""
    names = [name for name in outcomes if name != TEACHER]
    kl = resample([outcomes[name].kl_U for name in names], test_set.tokens_U, seed=SEED)
    errors = [[counts.errors for counts in outcomes[name].counts] for name in (TEACHER, *names)]
    rates = resample(errors, [counts.reference_length for counts in outcomes[TEACHER].counts], seed=SEED)
    say(f"\n### {test_set.name}, {int(test_set.tokens_U.sum())} response tokens\n")
    say("| | KL, 0.001 nats a token | % of text alone | % of SmoothQuant | top-1 % | errors % | more than teacher |")
    say("|---|---|---|---|---|---|---|")
    say(f"| {TEACHER} | | | | | {told(rates.rate(0), 100)} | |")
    for place, name in enumerate(names):
        agreement = outcomes[name].agreements_U.sum() / test_set.tokens_U.sum()
        cells = [
            told(kl.rate(place), 1000, digits=2),
            *(told(kl.ratio(place, names.index(other)), 100) for other in (TEXT_ONLY, SMOOTHQUANT)),
            f"{100 * agreement:.2f}",
            told(rates.rate(place + 1), 100),
            told(rates.difference(place + 1, 0), 100),
        ]
        say(f"| {name} | {' | '.join(cells)} |")
    return kl


def say_alphas(searched: Mapping[str, Mapping[GroupKey, SmoothedGroup]]) -> None:
    """Print what was chosen for each group, layer by layer."""
    keys = list(next(iter(searched.values())))
    say("\n| alpha | " + " | ".join(f"{number}.{group}" for number, group in keys) + " |")
    say("|---" * (len(keys) + 1) + "|")
    for name, smoothed in searched.items():
        alphas = [smoothed[key].choice.alpha for key in keys]
        say(f"| {name} | " + " | ".join("none" if alpha is None else f"{alpha:g}" for alpha in alphas) + " |")
    say("")


def claims(kl_by_set: Mapping[str, Resampled], names: Sequence[str]) -> list[str]:
    """Each claim on each set, with the figures that decide it."""
    wanted = [
        (OURS, TEXT_ONLY, MOST_OF_TEXT_ONLY),
        (OURS, SMOOTHQUANT, 1.0),
        (OURS, SMOOTHQUANT, AIM_OF_SMOOTHQUANT),
        (DYNAMIC, TEXT_ONLY, MOST_OF_TEXT_ONLY),
        (DYNAMIC, SMOOTHQUANT, AIM_OF_SMOOTHQUANT),
        (W4A8, PLAIN.format(W4A8), MOST_OF_PLAIN),
    ]
    found = []
    for first, second, most in wanted:
        for where, kl in kl_by_set.items():
            share = kl.ratio(names.index(first), names.index(second))
            assert share is not None
            found.append(f"- {first} has at most {most:.0%} of the KL of {second}, {where}: {verdict(share, most)}")
    return found


def verdict(share: Interval, most: float) -> str:
    """Whether a share is small enough, and whether other utterances of the kind might say otherwise."""
    holds = "holds" if share.value <= most else "does not hold"
    is_sure = share.high <= most or share.low > most
    return f"{holds} ({told(share, 100)} %; {'so says' if is_sure else 'on both sides is'} the interval)"


def told(interval: Interval | None, factor: float, *, digits: int = 1) -> str:
    """A value and its interval; empty if there is none."""
    if interval is None:
        return ""
    low, value, high = (f"{factor * one:.{digits}f}" for one in (interval.low, interval.value, interval.high))
    return f"{value} ({low} to {high})"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
