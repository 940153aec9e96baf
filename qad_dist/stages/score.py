"""score: every system decodes the same utterances; errors are counted, and the distance to the teacher is measured."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.dataset import mels_ahead
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import MODELOPT_STATE, AsrModel, load_model, load_teacher, resolve_model_folder
from qad_dist.asr.transcribe import Hypothesis, transcribe
from qad_dist.config import RunConfig
from qad_dist.distill.loss import row_metrics
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.int8 import use_int8
from qad_dist.quant.state import (
    QUANTIZATION,
    check_quantizers,
    enable_checkpointing,
    fold_weights,
    read_quantization,
    served_bytes,
)
from qad_dist.runtime.collectives import all_gather_objects, run_on_main
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import STUDENT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import World, check_enough_work, device_for, joined_world
from qad_dist.text.normalize import NORMALIZER, unit
from qad_dist.text.table import SCORE, score_markdown, score_summary, score_table
from qad_dist.text.wer import ErrorCounts, corpus, count_errors
from shards.errors import ShardError
from shards.index import UNKNOWN_LANGUAGE, read_utterances
from shards.plan import plan_decoding
from shards.schema import ENDED_BY_LENGTH, Utterance
from shards.storage import atomic_write, folder_bytes, read_json, verify_manifest, write_json
from shards.workers import Reader

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 6 * 3600
OWN_STUDENTS = {"ptq": "quantize", "qad": "train"}
"""Systems that every run has, and the stages that wrote them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one system made of one utterance."""

    number: int
    """Place of the utterance in the set."""
    hypothesis: Hypothesis
    counts: ErrorCounts | None
    """Of the utterance; None where it has no reference."""
    kl: float | None
    """Summed over the teacher's response tokens, in nats; None for the teacher itself and for another LM head."""
    agreements: int | None
    """Of these tokens, those that the system prefers too."""


def run(run: RunConfig) -> None:
    """Score teacher, PTQ student, QAD student and ``score.systems``; print the outcome.

    Raises:
        QadError: An earlier stage is missing, or a system cannot be loaded.
    """
    with joined_world(TIMEOUT_SECONDS) as world:
        require_stage(run, "train")
        utterances = _utterances(run)
        check_enough_work(world, len(utterances), stage="score")
        run_on_main(lambda: _student_folders(run))  # first one rank alone: a hub id is downloaded
        folders = _student_folders(run)
        run_on_main(lambda: [verify_manifest(folders[name]) for name in OWN_STUDENTS])
        run_on_main(lambda: begin_stage(run, "score"))
        enable_checkpointing()
        with open_reader(run) as reader:
            systems = _score_systems(run, folders, utterances, reader, world)
        run_on_main(lambda: _write(run, systems, utterances))


def table(run: RunConfig) -> None:
    """Print the table of a finished score again."""
    require_stage(run, "score")
    sys.stdout.write(score_table(read_json(run.stage_folder("score") / SCORE)))


def dry_run(run: RunConfig) -> None:
    """Say what would be scored."""
    utterances = _utterances(run)
    hours = sum(utterance.duration_seconds for utterance in utterances) / 3600
    names = ["teacher", *OWN_STUDENTS, *run.score.systems]
    log.info("event=dry_run stage=score utterances=%d audio_hours=%.3f systems=%s", len(utterances), hours, names)


def _utterances(run: RunConfig) -> list[Utterance]:
    utterances = list(read_utterances(run.stage_folder("pack"), splits=run.score.splits))
    if all(utterance.reference is None for utterance in utterances):
        raise ShardError(
            f"score.splits must name splits with references, got {run.score.splits}: {len(utterances)} utterances, "
            "none with a reference; pack a test set with transcripts"
        )
    return utterances


def _student_folders(run: RunConfig) -> dict[str, Path]:
    folders = {name: run.stage_folder(stage) / STUDENT for name, stage in OWN_STUDENTS.items()}
    for name, path in run.score.systems.items():
        folders[name] = resolve_model_folder(path, setting=f"score.systems.{name}")
    return folders


def _score_systems(
    run: RunConfig, folders: dict[str, Path], utterances: Sequence[Utterance], reader: Reader, world: World
) -> dict[str, Any]:
    """The part of each system in ``score.json``; its predictions are written when it is done."""
    teacher = load_teacher(run.model, device_for(world))
    answers = _score_system(run, "teacher", teacher, None, utterances, reader, world)
    systems = {"teacher": _described(teacher.folder, None, utterances, answers, answers)}
    run_on_main(lambda: _write_predictions(run, "teacher", utterances, answers))
    for name, folder in folders.items():
        num_served_bytes, outcomes = _score_student(run, name, folder, (teacher, answers), utterances, reader, world)
        systems[name] = _described(folder, num_served_bytes, utterances, outcomes, answers)
        run_on_main(lambda name=name, outcomes=outcomes: _write_predictions(run, name, utterances, outcomes))
    return systems


def _score_student(
    run: RunConfig,
    name: str,
    folder: Path,
    teacher: tuple[AsrModel, list[Outcome]],
    utterances: Sequence[Utterance],
    reader: Reader,
    world: World,
) -> tuple[int | None, list[Outcome]]:
    """Bytes in INT8 (None if it is not quantized) and outcomes of one student, which is gone from memory afterwards."""
    is_quantized = (folder / MODELOPT_STATE).exists()
    system = load_model(
        folder,
        dtype=run.model.dtype,
        audio_attention=run.model.audio_attention,
        device=device_for(world),
        quantized=is_quantized,
    )
    if (folder / QUANTIZATION).is_file():
        check_quantizers(system.model, read_quantization(folder))
    # Before folding: it drops the weight quantizers, by which quantized tensors are known.
    num_served_bytes = served_bytes(system.model) if is_quantized else None
    if is_quantized and run.score.arithmetic == "int8":
        log.info("event=int8 system=%s linears=%d", name, use_int8(system.decoder))
    else:
        if is_quantized:
            use_fast_fake_quant(system.model)
        fold_weights(system.model)
    return num_served_bytes, _score_system(run, name, system, teacher, utterances, reader, world)


def _score_system(
    run: RunConfig,
    name: str,
    system: AsrModel,
    teacher: tuple[AsrModel, list[Outcome]] | None,
    utterances: Sequence[Utterance],
    reader: Reader,
    world: World,
) -> list[Outcome]:
    """Outcomes of all utterances, in their order, on every rank. Batches depend on set and settings only."""
    batches = plan_decoding([u.duration_seconds for u in utterances], batch_audio_seconds=run.score.batch_audio_seconds)
    own = batches[world.rank :: world.world_size]
    # KL needs one head for both: without it there is no distance.
    is_comparable = teacher is not None and torch.equal(system.head_weight_VD, teacher[0].head_weight_VD)
    outcomes: list[Outcome] = []
    chosen = ([utterances[number] for number in numbers] for numbers in own)
    loaded = mels_ahead(reader, chosen, system.extractor)
    progress = tqdm(own, desc=f"score {name}", unit="batch", disable=None if world.is_main else True)
    for numbers, mels in zip(progress, loaded, strict=True):
        hypotheses = transcribe(system, mels, max_response_tokens=run.score.max_response_tokens)
        distances: Sequence[tuple[float | None, int | None]] = [(None, None)] * len(numbers)
        if teacher is not None and is_comparable:
            responses = [teacher[1][number].hypothesis.token_ids for number in numbers]
            distances = _distances(run, system, teacher[0], mels, responses)
        for number, hypothesis, (kl, agreements) in zip(numbers, hypotheses, distances, strict=True):
            counts = _counts(utterances[number], hypothesis)
            outcomes.append(Outcome(number=number, hypothesis=hypothesis, counts=counts, kl=kl, agreements=agreements))
    gathered = sorted((o for share in all_gather_objects(outcomes) for o in share), key=lambda o: o.number)
    if world.is_main:
        log.info("event=scored system=%s utterances=%d", name, len(gathered))
    return gathered


def _counts(utterance: Utterance, hypothesis: Hypothesis) -> ErrorCounts | None:
    """An empty reference counts: whatever is heard in silence is inserted."""
    if utterance.reference is None:
        return None
    return count_errors(utterance.reference, hypothesis.text, language=utterance.language)


def _distances(
    run: RunConfig,
    system: AsrModel,
    teacher: AsrModel,
    mels: Sequence[Tensor],
    responses: Sequence[Sequence[int]],
) -> list[tuple[float, int]]:
    """KL and agreements of each utterance, summed over the teacher's own response tokens, through the common head."""
    examples = [
        Example(key=str(i), mel_MF=mel_MF, response_ids=response)
        for i, (mel_MF, response) in enumerate(zip(mels, responses, strict=True))
    ]
    batch = collate(examples, prompt=teacher.prompt).to(teacher.device)
    with torch.no_grad():
        states = [
            response_states(DecoderStack(model.decoder.layers), embed(model, batch), model.decoder.norm)
            for model in (system, teacher)
        ]
    rows = row_metrics(
        states[0], states[1], teacher.head_weight_VD, batch.targets_R, chunk_rows=run.train.loss_chunk_rows
    )
    lengths = [len(response) for response in responses]
    kl_sums = [float(part.double().sum()) for part in rows.kl_R.split(lengths)]
    agreements = [int(part.sum()) for part in rows.agrees_R.split(lengths)]
    return list(zip(kl_sums, agreements, strict=True))


def _described(
    folder: Path,
    num_served_bytes: int | None,
    utterances: Sequence[Utterance],
    outcomes: list[Outcome],
    answers: list[Outcome],
) -> dict[str, Any]:
    """One system's part of ``score.json``."""
    languages = sorted({utterance.language or UNKNOWN_LANGUAGE for utterance in utterances})
    by_language = {
        language: _row(
            [o for o in outcomes if (utterances[o.number].language or UNKNOWN_LANGUAGE) == language],
            utterances,
            answers,
            rate_unit=unit(None if language == UNKNOWN_LANGUAGE else language),
        )
        for language in languages
    }
    units = {row["unit"] for row in by_language.values()}
    overall = _row(outcomes, utterances, answers, rate_unit="/".join(sorted(units, reverse=True)))
    return {
        "path": str(folder),
        "disk_bytes": folder_bytes(folder, suffixes=(".safetensors", MODELOPT_STATE)),
        "served_bytes": num_served_bytes,
        "overall": overall,
        "languages": by_language,
    }


def _row(
    outcomes: list[Outcome], utterances: Sequence[Utterance], answers: list[Outcome], *, rate_unit: str
) -> dict[str, Any]:
    """Counts over some utterances; rates are divided once, here."""
    counts = corpus(o.counts for o in outcomes if o.counts is not None)
    told = [o for o in outcomes if utterances[o.number].language]
    right = sum(o.hypothesis.language == utterances[o.number].language for o in told)
    tokens = sum(len(answers[o.number].hypothesis.token_ids) for o in outcomes)
    measured = all(o.kl is not None for o in outcomes)
    return {
        "unit": rate_unit,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "reference_tokens": counts.reference_length,
        "error_rate": counts.rate,
        "utterances": len(outcomes),
        "kl_per_token": sum(o.kl or 0.0 for o in outcomes) / tokens if measured else None,
        "agreement": sum(o.agreements or 0 for o in outcomes) / tokens if measured else None,
        "response_tokens": tokens,
        "language_accuracy": right / len(told) if told else None,
        "runaway": sum(o.hypothesis.ended_by == ENDED_BY_LENGTH for o in outcomes),
    }


def _write_predictions(run: RunConfig, name: str, utterances: Sequence[Utterance], outcomes: list[Outcome]) -> None:
    """``<run>/score/<system>.jsonl``: what was said, what was written, and the counts of each utterance."""
    with atomic_write(run.stage_folder("score") / f"{name}.jsonl") as file:
        for outcome in outcomes:
            utterance, hypothesis = utterances[outcome.number], outcome.hypothesis
            line = {
                "key": utterance.key,
                "language": utterance.language,
                "reference": utterance.reference,
                "hypothesis": hypothesis.text,
                "detected_language": hypothesis.language,
                "token_ids": hypothesis.token_ids,
                "ended_by": hypothesis.ended_by,
                "kl": outcome.kl,
                "duration_seconds": utterance.duration_seconds,
                **(asdict(outcome.counts) if outcome.counts is not None else {}),
            }
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _write(run: RunConfig, systems: dict[str, Any], utterances: Sequence[Utterance]) -> None:
    score = {
        "normalizer": NORMALIZER,
        "prompt": "automatic language",
        "dtype": run.model.dtype,
        "audio_attention": run.model.audio_attention,
        "splits": list(run.score.splits),
        "num_utterances": len(utterances),
        "audio_hours": sum(utterance.duration_seconds for utterance in utterances) / 3600,
        "systems": systems,
    }
    folder = run.stage_folder("score")
    write_json(folder / SCORE, score)
    with atomic_write(folder / "score.md") as file:
        file.write(score_markdown(score).encode())
    overall = {name: system["overall"]["error_rate"] for name, system in systems.items()}
    finish_stage(run, "score", results={"error_rate": overall})
    sys.stdout.write(score_summary(score) + "By language: launch/score.py table, or score.md beside score.json\n")
    sys.stdout.flush()
