"""quantize: the teacher with a decoder in fewer bits, calibrated on audio in the real prompt and measured."""

import ctypes
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.asr.made_clips import make_clips
from qad_dist.calibration import CalibrationData
from qad_dist.calibration_set import CalibrationSet, choose_calibration
from qad_dist.config import RunConfig
from qad_dist.formats import FormatName
from qad_dist.heldout import HeldOut
from qad_dist.pairing import save_student
from qad_dist.quant.calibrate import Calibration, GroupKey, SmoothedGroup, cast_parameters
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.high_precision import LinearSwitch, keep_fewest
from qad_dist.quant.sensitivity import LinearSensitivity, as_json, groups_by_kl, measure_sensitivity
from qad_dist.quant.state import (
    Quantization,
    check_quantizers,
    enable_checkpointing,
    keep_in_high_precision,
    linears_matching,
    quantizer_hash,
    served_bytes,
)
from qad_dist.quant.walk import WalkBatch
from qad_dist.runtime.collectives import all_gather_objects, run_on_main
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import STUDENT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import World, check_enough_work, device_for, joined_world
from qad_dist.text.comparison import Measured, compare_formats, comparison_markdown, comparison_summary
from qad_dist.text.sensitivity_picture import draw_sensitivity
from qad_dist.text.sensitivity_table import sensitivity_markdown, sensitivity_summary
from shards.errors import ModelError
from shards.pictures import drawn_if_possible
from shards.storage import atomic_write, write_json
from shards.workers import Reader

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3600

CHUNKS_AT_ONCE = 32
"""Seconds of audio that the tower's convolutions take at once: in float32 100 MB behind the first one, by the
checkpoint's own 500 chunks 3 GB. The results are the same."""


def run(run: RunConfig) -> None:
    """Quantize the teacher's decoder, write ``<run>/quantize/student`` and what is to be said about it.

    Raises:
        QadError: Labels are missing, the model cannot be loaded, a quantizer saw no data, or ``quantize.kl_budget`` is
            out of reach.
    """
    with joined_world(TIMEOUT_SECONDS) as world:
        require_stage(run, "label")
        # Rank 0 alone reads all labels; the others get what it chose.
        chosen = run_on_main(lambda: choose_calibration(run))
        check_enough_work(world, len(chosen.rows), stage="quantize")
        run_on_main(lambda: begin_stage(run, "quantize"))
        enable_checkpointing()
        with open_reader(run) as reader:
            results = _quantize(run, chosen, reader, world)
        run_on_main(lambda: finish_stage(run, "quantize", results=results))


def dry_run(run: RunConfig) -> None:
    """Say what would be calibrated on."""
    chosen = choose_calibration(run)
    seconds = chosen.rows.utterances.numbers("duration_seconds").sum()
    log.info(
        "event=dry_run stage=quantize format=%s calibration_utterances=%d audio_hours=%.3f",
        *(run.quantize.format, len(chosen.rows), seconds / 3600),
    )


def _quantize(run: RunConfig, chosen: CalibrationSet, reader: Reader, world: World) -> dict[str, Any]:
    """Everything that is written; returns what the stage's record says."""
    data, heldout, few = _ask_teacher(run, chosen, reader, world)
    measured, results = _make_student(run, data, heldout, few, world)
    compared = {run.quantize.format: measured}
    for name in run.quantize.compare:
        if name not in compared:
            log.info("event=compare format=%s", name)
            compared[name] = _measure(_calibrate(run, name, data, world)[0], heldout)
    run_on_main(lambda: _write_comparison(run, compared))
    return {
        "calibration_utterances": len(chosen.rows),
        "calibration_audio_seconds": float(chosen.rows.utterances.numbers("duration_seconds").sum()),
        "calibration_silent": chosen.num_silent,
        "calibration_long": chosen.num_long,
        "made_clips": data.num_made,
        **results,
    }


def _make_student(
    run: RunConfig, data: CalibrationData, heldout: HeldOut, few: HeldOut | None, world: World
) -> tuple[Measured, dict[str, Any]]:
    """Write the student, and what each of its Linears costs on ``few`` utterances, if anybody asked."""
    student, calibration, smoothed = _calibrate(run, run.quantize.format, data, world)
    explained, overall = ([], {}) if few is None else _explain(few, student, calibration, smoothed)
    quantization = _keep(run, student, calibration, heldout, explained)
    digest = _equal_on_all_ranks(quantizer_hash(student.model))
    measured = _measure(student, heldout)
    path = run.stage_folder("quantize") / STUDENT
    run_on_main(lambda: save_student(student, quantization, path, dtype=run.model.dtype))
    if explained:
        run_on_main(lambda: _write_sensitivity(run, as_json(explained, kept=quantization.kept, **overall)))
    results = {
        "format": quantization.format,
        "kept": list(quantization.kept),
        "quantizers": check_quantizers(student.model, quantization),
        "quantizer_sha256": digest,
        "alpha": {f"layers.{number}.{name}": one.choice.alpha for (number, name), one in smoothed.items()},
        "kept_share": {f"layers.{number}.{name}": one.choice.kept_share for (number, name), one in smoothed.items()},
        "heldout_kl": float(measured.kl_U.sum() / measured.tokens_U.sum()),
        "served_bytes": measured.served_bytes,
    }
    log.info("event=student format=%s quantizers=%d path=%s", quantization.format, results["quantizers"], path)
    return measured, results


def _ask_teacher(
    run: RunConfig, chosen: CalibrationSet, reader: Reader, world: World
) -> tuple[CalibrationData, HeldOut, HeldOut | None]:
    """All that the teacher is needed for; then it goes, and leaves its memory to a student in float32.

    It answers the held-out utterances as it computes in the run, and the clips that are made in float32, as those are
    calibrated on.
    """
    teacher = _load(run, world)
    heldout = HeldOut(run, teacher, reader, world, max_utterances=run.quantize.evaluate_utterances)
    few = None
    if wanted := run.quantize.sensitivity_utterances:
        few = HeldOut(run, teacher, reader, world, max_utterances=wanted)
    cast_parameters(teacher.model, torch.float32)
    silent, long = (chosen.missing_silent, chosen.missing_long) if run.quantize.make_clips else (0, 0)
    made = make_clips(teacher, chosen.joinable, reader=reader, silent=silent, long=long, settings=run.label)
    log.info(
        "event=calibration utterances=%d search=%d languages=%d silent=%d long=%d made_silent=%d made_long=%d",
        *(len(chosen.rows), int(chosen.is_search.sum()), chosen.num_languages, chosen.num_silent, chosen.num_long),
        *(silent, long),
    )
    return CalibrationData(run, chosen, made, reader, world), heldout, few


def _calibrate(
    run: RunConfig, name: FormatName, data: CalibrationData, world: World
) -> tuple[AsrModel, Calibration, dict[GroupKey, SmoothedGroup]]:
    """A student of one format; all other settings are the run's."""
    _release_freed_memory()
    student = _load(run, world, in_float32=True)
    section = run.quantize.model_copy(update={"format": name})
    calibration = Calibration(student.model, student.decoder.layers, section, data.source(student))
    use_fast_fake_quant(student.model)
    smoothed = calibration.run(getattr(torch, run.model.dtype))
    _release_freed_memory()
    log.info("event=calibrated format=%s", name)
    return student, calibration, smoothed


def _load(run: RunConfig, world: World, *, in_float32: bool = False) -> AsrModel:
    """The teacher of the run, computing in ``model.dtype`` or, with the same weights, in float32.

    These are cast one by one as they lie in the mapped file. Loaded as float32 there would be two heads for a while,
    beside all of the file: 1 GB more of Qwen3-ASR-0.6B.
    """
    teacher = load_teacher(run.model, device_for(world))
    teacher.audio_tower.conv_chunksize = min(CHUNKS_AT_ONCE, teacher.audio_tower.conv_chunksize)
    if in_float32:
        cast_parameters(teacher.model, torch.float32)
    return teacher


def _release_freed_memory() -> None:
    """Give the system what the C library keeps of freed weights: gigabytes, in pieces too small for activations."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's alone
        libc.malloc_trim(0)


def _explain(
    few: HeldOut, student: AsrModel, calibration: Calibration, smoothed: Mapping[GroupKey, SmoothedGroup]
) -> tuple[list[LinearSensitivity], dict[str, float]]:
    """What each Linear costs alone, and all or none of them on the same utterances."""
    layers, exact = student.decoder.layers, calibration.exact
    overall = {"kl_per_token": few.distances(student).kl_per_token}
    switch = LinearSwitch(layers, exact=exact)
    switch.switch_all(on=False)
    overall["kl_unquantized"] = few.distances(student).kl_per_token
    switch.switch_all(on=True)

    def kl(batch: WalkBatch, hidden_ND: Tensor) -> tuple[float, int]:
        return few.kl(student, batch, hidden_ND)

    return measure_sensitivity(layers, few.batches, kl=kl, smoothed=smoothed, exact=exact), overall


def _keep(
    run: RunConfig,
    student: AsrModel,
    calibration: Calibration,
    heldout: HeldOut,
    explained: list[LinearSensitivity],
) -> Quantization:
    """Leave out what ``quantize.keep_high_precision`` says, and tell what is left."""
    layers = student.decoder.layers
    wanted, budget = run.quantize.keep_high_precision, run.quantize.kl_budget
    if wanted == "auto":
        assert budget is not None  # the section says so
        kept = keep_fewest(
            layers,
            groups_by_kl(explained),
            evaluate=lambda: heldout.distances(student).kl_per_token,
            budget=budget,
            exact=calibration.exact,
        )
    else:
        kept = linears_matching(wanted, num_layers=len(layers))
    keep_in_high_precision(layers, kept, exact=calibration.exact)
    return Quantization(format=run.quantize.format, num_layers=len(layers), kept=tuple(sorted(kept)))


def _measure(student: AsrModel, heldout: HeldOut) -> Measured:
    found = heldout.distances(student)
    return Measured(
        kl_U=found.kl_U,
        agreements_U=found.agreements_U,
        tokens_U=found.tokens_U,
        served_bytes=served_bytes(student.model),
    )


def _equal_on_all_ranks(digest: str) -> str:
    digests = all_gather_objects(digest)
    if len(set(digests)) != 1:
        raise ModelError(f"all ranks must have equal quantizers, got {[d[:12] for d in digests]}; please report this")
    return digest


def _write_sensitivity(run: RunConfig, sensitivity: dict[str, Any]) -> None:
    folder = run.stage_folder("quantize")
    write_json(folder / "sensitivity.json", sensitivity)
    with atomic_write(folder / "sensitivity.md") as file:
        file.write(sensitivity_markdown(sensitivity).encode())
    path = folder / "sensitivity.png"
    with drawn_if_possible(path, log):
        draw_sensitivity(sensitivity, path)
    sys.stdout.write(sensitivity_summary(sensitivity))
    sys.stdout.flush()


def _write_comparison(run: RunConfig, measured: Mapping[str, Measured]) -> None:
    folder = run.stage_folder("quantize")
    comparison = compare_formats(measured, chosen=run.quantize.format)
    write_json(folder / "comparison.json", comparison)
    with atomic_write(folder / "comparison.md") as file:
        file.write(comparison_markdown(comparison).encode())
    sys.stdout.write(comparison_summary(comparison))
    sys.stdout.flush()
