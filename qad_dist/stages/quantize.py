"""quantize: the teacher with INT8 SmoothQuant in its decoder, calibrated on audio in the real prompt."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from qad_dist.asr.dataset import LabelledSet, languages_of
from qad_dist.asr.decoder import DecoderStack, embed
from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.asr.save import save_checkpoint
from qad_dist.config import RunConfig
from qad_dist.labelling import read_used_labels
from qad_dist.quant.calibrate import quantize_decoder
from qad_dist.quant.state import check_quantizers, enable_checkpointing, int8_bytes, quantizer_hash
from qad_dist.runtime.collectives import all_gather_objects, run_on_main
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import STUDENT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import World, check_enough_work, device_for, joined_world
from shards.errors import ModelError
from shards.labelled import LabelledTable
from shards.plan import plan_epoch
from shards.schema import TRAIN

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3600


def run(run: RunConfig) -> None:
    """Quantize the teacher's decoder and write ``<run>/quantize/student``.

    Raises:
        QadError: Labels are missing, the model cannot be loaded, or a quantizer saw no data.
    """
    with joined_world(TIMEOUT_SECONDS) as world:
        require_stage(run, "label")
        # Rank 0 alone reads all labels; the others get what it chose.
        rows = run_on_main(lambda: calibration_rows(run))
        check_enough_work(world, len(rows), stage="quantize")
        run_on_main(lambda: begin_stage(run, "quantize"))
        enable_checkpointing()
        student = load_teacher(run.model, device_for(world), dtype="float32")
        with open_reader(run) as reader:
            prompt = student.prompt.with_context(run.label.context)
            dataset = LabelledSet(rows, reader=reader, prompt=prompt, extractor=student.extractor)
            calibrate(run, student, dataset, world)
        digest = _equal_on_all_ranks(quantizer_hash(student.model))
        run_on_main(lambda: _write(run, student, dataset, digest))


def dry_run(run: RunConfig) -> None:
    """Say what would be calibrated on."""
    rows = calibration_rows(run)
    seconds = rows.utterances.numbers("duration_seconds").sum()
    log.info("event=dry_run stage=quantize calibration_utterances=%d audio_hours=%.3f", len(rows), seconds / 3600)


def calibration_rows(run: RunConfig) -> LabelledTable:
    """``quantize.calibration_utterances`` of the labelled training split, spread over languages and durations.

    Languages take turns; within a language the utterances are sorted by duration and taken at equal distances, so that
    the shortest and the longest are among them.
    """
    rows = read_used_labels(run, TRAIN).rows
    by_duration = np.argsort(rows.utterances.numbers("duration_seconds"), kind="stable")
    codes, names = languages_of(rows, detected_first=False)
    quotas = share_out(run.quantize.calibration_utterances, np.bincount(codes, minlength=len(names)).tolist())
    chosen: list[int] = []
    for code, quota in enumerate(quotas):
        ordered = by_duration[codes[by_duration] == code]
        chosen += ordered[np.linspace(0, len(ordered) - 1, quota).round().astype(int)].tolist()
    return rows.take(chosen)


def share_out(total: int, available: Sequence[int]) -> list[int]:
    """Split ``total`` as evenly as ``available`` allows; what a small group cannot give, the larger ones do. Pure."""
    quotas = [0] * len(available)
    left = min(total, sum(available))
    while left:
        open_groups = [i for i, size in enumerate(available) if quotas[i] < size]
        each = max(1, left // len(open_groups))
        for i in open_groups:
            take = min(each, available[i] - quotas[i], left)
            quotas[i] += take
            left -= take
    return quotas


def calibrate(run: RunConfig, student: AsrModel, dataset: LabelledSet, world: World) -> None:
    """Run this rank's share of the calibration set through the quantized decoder, as often as ModelOpt asks."""
    steps = plan_epoch(
        dataset.num_tokens,
        seed=run.seed,
        epoch=0,
        token_budget=max(run.quantize.micro_batch_tokens, int(dataset.num_tokens.max())),
        micro_batches_per_step=1,
    )
    own = [step[0] for step in steps][world.rank :: world.world_size]
    if not own:  # fewer batches than ranks: seeing a batch twice does not change a maximum
        own = [steps[0][0]]
    stack = DecoderStack(student.decoder.layers)

    @torch.no_grad()
    def forward_loop() -> None:
        for host_batch in dataset.batches(own):
            batch = host_batch.to(student.device)
            if batch.audio_positions_P.numel() == 0:
                raise ModelError("calibration batches must hold audio positions, got none; the prompt is broken")
            embedded = embed(student, batch)
            stack(embedded.hidden_ND, embedded.cos_1NE, embedded.sin_1NE, embedded.segments)

    quantize_decoder(
        student.model,
        student.decoder.layers,
        forward_loop,
        alpha=run.quantize.alpha,
        dtype=getattr(torch, run.model.dtype),
    )


def _equal_on_all_ranks(digest: str) -> str:
    digests = all_gather_objects(digest)
    if len(set(digests)) != 1:
        raise ModelError(f"all ranks must have equal quantizers, got {[d[:12] for d in digests]}; please report this")
    return digest


def _write(run: RunConfig, student: AsrModel, dataset: LabelledSet, digest: str) -> None:
    num_layers = len(student.decoder.layers)
    folder = run.stage_folder("quantize") / STUDENT
    save_checkpoint(student.model, folder, base=student.folder, dtype=run.model.dtype)
    results = {
        "quantizers": check_quantizers(student.model, num_layers=num_layers),
        "quantizer_sha256": digest,
        "calibration_utterances": len(dataset.rows),
        "calibration_audio_seconds": float(dataset.seconds.sum()),
        "calibration_tokens": int(dataset.num_tokens.sum()),
        "int8_bytes": int8_bytes(student.model),
    }
    finish_stage(run, "quantize", results=results)
    log.info("event=finished stage=quantize path=%s quantizers=%d", folder, results["quantizers"])
