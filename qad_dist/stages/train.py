"""train: quantization-aware distillation. The teacher is whole on every rank, the student's decoder is sharded."""

import json
import logging
import shutil
import sys
from typing import Any

import torch

from qad_dist.asr.dataset import PlannedBatches
from qad_dist.asr.decoder import DecoderStack, compile_layers
from qad_dist.asr.load import AsrModel
from qad_dist.config import RunConfig
from qad_dist.distill.checkpoint import BEST, STATE, Checkpoints, TrainingState, load_best, save_best
from qad_dist.distill.evaluate import Evaluation
from qad_dist.distill.loop import Hooks, train
from qad_dist.distill.metrics import MetricsFile
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import choose_trainable, parameter_groups
from qad_dist.distill.preflight import preflight, tell_memory
from qad_dist.distill.sanity import overfit
from qad_dist.distill.window import BadBatch
from qad_dist.look import Look
from qad_dist.pairing import join_models, load_student, save_student
from qad_dist.quant.state import Quantization, quantizer_hash, served_bytes
from qad_dist.runtime.collectives import all_gather_objects, run_on_main
from qad_dist.runtime.engine import Engine, build_engine
from qad_dist.runtime.engine.memory import memory_formula
from qad_dist.runtime.progress import StepProgress
from qad_dist.runtime.quarantine import QUARANTINE, SharedQuarantine, open_quarantine
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import DONE, STUDENT, WITHOUT_EFFECT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import World, check_enough_work, check_micro_batches, joined_world
from qad_dist.runtime.zero import zero_stage
from qad_dist.text.gap import GAP, Gap, gap_summary
from qad_dist.text.loss_picture import LOSS_PICTURE, draw_losses
from qad_dist.training_data import Data, largest_micro_batches, load_data
from qad_dist.training_models import Models, load_models
from shards.errors import CheckpointError, ModelError, StageError
from shards.pictures import drawn_if_possible
from shards.storage import fingerprint, read_json, settle_interrupted, verify_manifest, write_json
from shards.workers import Reader

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 1800
METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
"""Micro-batches whose loss was no finite number: their utterances, by step."""
SANITY_UTTERANCES, SANITY_SHARE = 4, 0.5
"""How many are learned by heart, and to what share of the first loss."""


def run(run: RunConfig) -> None:
    """Distil, keep the student that is nearest to the teacher on the held-out split, write ``<run>/train/student``.

    Raises:
        QadError: An earlier stage is missing, a checkpoint does not fit, too many losses are no numbers, or more
            utterances than ``read.max_quarantined_share`` cannot be read.
    """
    with joined_world(TIMEOUT_SECONDS) as world:
        check_micro_batches(world, run.train.micro_batches_per_step)
        quantized = require_stage(run, "quantize")
        run_on_main(lambda: verify_manifest(run.stage_folder("quantize") / STUDENT))
        models = load_models(run, world)
        _check_quantizer_hash(models.student, quantized["results"]["quantizer_sha256"])
        with open_reader(run) as reader:
            data = load_data(run, models.teacher, reader)
            check_enough_work(world, len(data.training), stage="train")
            engine = _engine(run, models.student, world)
            _check_quantizer_hash(models.student, quantized["results"]["quantizer_sha256"])
            state, num_quarantined = _distil(run, engine, models, data, reader, world)
        results = {
            "is_final": True,
            "step": state.step,
            "skipped": state.skipped,
            "world_size": engine.world_size,
            "sharding": engine.name,
            "quarantined": num_quarantined,
        }
        run_on_main(lambda: _write(run, models.written, models.quantization, results))
        engine.close()


def sanity(run: RunConfig) -> None:
    """See that the student learns :data:`SANITY_UTTERANCES` utterances by heart; writes nothing.

    Raises:
        QadError: It does not, or an earlier stage is missing.
    """
    with joined_world(TIMEOUT_SECONDS) as world:
        require_stage(run, "quantize")
        models = load_models(run, world)
        with open_reader(run) as reader:
            data = load_data(run, models.teacher, reader)
            engine = _engine(run, models.student, world)
            joined = _join(run, models, engine)
            step = max(1, len(data.training.rows) // SANITY_UTTERANCES)
            batch = data.training.batch(list(range(0, len(data.training.rows), step))[:SANITY_UTTERANCES])
            losses = overfit(engine, joined, batch, run.train, must_fall_to=SANITY_SHARE)
        log.info("event=finished stage=train sanity=passed loss=%.6f was=%.6f", losses[-1], losses[0])
        engine.close()


def publish(run: RunConfig) -> None:
    """Write the best student so far as the stage's result, while training goes on or after it was stopped.

    Score and export then take it as they would the last one. When training ends, its own result takes the place.

    Raises:
        QadError: There is no best student yet.
    """
    folder = run.stage_folder("train")
    if not (folder / BEST).is_dir():
        raise StageError(f"{folder / BEST} must hold a student, got none yet; training writes it before its first step")
    student, quantization = load_student(run, run.stage_folder("quantize") / STUDENT, torch.device("cpu"))
    _write(run, student, quantization, {"is_final": False})


def dry_run(run: RunConfig) -> None:
    """Say what would be trained."""
    log.info(
        "event=dry_run stage=train zero_stage=%d steps=%d tokens_per_step=%d",
        *(zero_stage(run.train.deepspeed), run.train.steps),
        run.train.micro_batch_tokens * run.train.micro_batches_per_step,
    )


def make_optimizer(run: RunConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as the run's settings say."""
    return torch.optim.AdamW(
        parameter_groups(module.parameters(), weight_decay=run.train.weight_decay),
        lr=run.train.learning_rate,
        betas=(run.train.beta1, run.train.beta2),
    )


def _engine(run: RunConfig, student: AsrModel, world: World) -> Engine:
    stack = DecoderStack(student.decoder.layers, keeps_all=run.train.compares_layers)
    choose_trainable(stack, train_norms=run.train.train_norms)
    num_weights = sum(parameter.numel() for parameter in stack.parameters())
    num_trained = sum(parameter.numel() for parameter in stack.parameters() if parameter.requires_grad)
    dtype = getattr(torch, run.model.dtype)
    engine = build_engine(
        stack,
        lambda module: make_optimizer(run, module),
        deepspeed=run.train.deepspeed,
        world=world,
        dtype=dtype,
        clip_norm=run.train.clip_norm,
        trackers=list(run.train.trackers),
        tracker_folder=run.stage_folder("train"),
    )
    log.info(
        "event=engine sharding=%s type=%s ranks=%d trained_weights=%d",
        *(engine.name, engine.distributed_type, engine.world_size, num_trained),
    )
    tell_memory(
        "formula",
        memory_formula(
            num_trained=num_trained,
            num_frozen=num_weights - num_trained,
            sharding=engine.name,
            world_size=world.world_size,
            dtype=dtype,
        ),
    )
    return engine


def _join(run: RunConfig, models: Models, engine: Engine) -> TeacherAndStudent:
    return join_models(
        models.teacher,
        models.student,
        engine,
        is_cached=run.train.teacher == "cached",
        compares_layers=run.train.compares_layers,
    )


def _check_quantizer_hash(student: AsrModel, expected: str) -> None:
    """Every rank has the quantizers that were calibrated: loading and the engine change parameters, never these."""
    for rank, digest in enumerate(all_gather_objects(quantizer_hash(student.model))):
        if digest != expected:
            raise ModelError(
                f"the quantizers of rank {rank} must be those that quantize wrote ({expected[:12]}), got "
                f"{digest[:12]}; run quantize again"
            )


def _initial_state(run: RunConfig, data: Data) -> TrainingState:
    """The state before the first step, with the fingerprint of everything that decides the course of training."""
    quantized = read_json(run.stage_folder("quantize") / DONE)
    mark = fingerprint(
        run.seed,
        run.train.model_dump(mode="json", exclude=WITHOUT_EFFECT["train"] | {"deepspeed"}),
        [data.plan.fingerprint(), data.training.fingerprint(), data.heldout.fingerprint()],
        quantized["fingerprint"],
    )
    return TrainingState(fingerprint=mark)


def _distil(
    run: RunConfig, engine: Engine, models: Models, data: Data, reader: Reader, world: World
) -> tuple[TrainingState, int]:
    """The state behind the last step, and how many utterances could not be read."""
    folder = run.stage_folder("train")
    joined = _join(run, models, engine)
    checkpoints = Checkpoints(folder, keep=run.train.keep_checkpoints)
    state = _initial_state(run, data)
    run_on_main(lambda: settle_interrupted(folder))  # a checkpoint may have no name but its retired one
    if path := run_on_main(lambda: checkpoints.choose(run.train.resume)):
        state = checkpoints.load(engine, path, expected=state)
        log.info("event=resumed step=%d path=%s", state.step, path)
    if _compiles(run, joined):
        compile_layers(models.teacher.decoder.layers, models.student.decoder.layers)
    if run.train.preflight and state.step < run.train.steps:
        preflight(engine, joined, largest_micro_batches(data, run.train.steps), run.train)
    state = run_on_main(lambda: _begin(run, checkpoints, state))
    quarantine = open_quarantine(run, world, num_utterances=len(data.training.rows) + len(data.heldout.rows))
    look = Look(
        run,
        joined,
        data.heldout,
        engine=engine,
        student=models.student,
        decoding=models.decoding,
        reader=reader,
        world=world,
        on_damaged=quarantine.add,
    )
    if state.step == 0 and state.best_step < 0 and (gap := look.gap()) is not None:
        run_on_main(lambda: _tell_gap(run, gap))
    engine.start_trackers("qad", {"learning_rate": run.train.learning_rate, "steps": run.train.steps})
    progress = StepProgress("train", done=state.step, steps=run.train.steps) if world.is_main else None
    hooks = _hooks(run, engine, look, quarantine, state, progress)
    with PlannedBatches(data.training, data.plan, world, steps=run.train.steps, on_damaged=quarantine.add) as batches:
        state = train(engine, joined, batches, run.train, state=state, checkpoints=checkpoints, hooks=hooks)
    if progress is not None:
        progress.close()
    return state, quarantine.count()


def _compiles(run: RunConfig, models: TeacherAndStudent) -> bool:
    """ZeRO-3 gathers weights in hooks, which no graph holds."""
    if run.train.compile is not None:
        return run.train.compile
    return models.device.type == "cuda" and zero_stage(run.train.deepspeed) != 3


def _hooks(
    run: RunConfig,
    engine: Engine,
    look: Look,
    quarantine: SharedQuarantine,
    state: TrainingState,
    progress: StepProgress | None,
) -> Hooks:
    """Of this rank; only the one with a progress writes."""
    folder = run.stage_folder("train")
    metrics = None if progress is None else MetricsFile(folder / METRICS, resumed_step=state.step)
    skipped = None if progress is None else MetricsFile(folder / SKIPPED, resumed_step=state.step)

    def write(step: int, values: dict[str, float]) -> None:
        if metrics is not None:
            metrics.write(step, values)
        engine.track(values, step=step)

    def write_bad(step: int, bad: list[BadBatch]) -> None:
        if skipped is not None:
            for one in bad:
                skipped.write(step, {"skipped_step": one.step, "keys": list(one.keys)})

    def keep_best(step: int, evaluation: Evaluation) -> None:
        weights = engine.gather_weights()
        run_on_main(lambda: save_best(folder / BEST, weights, step=step, kl_per_token=evaluation.kl_per_token))

    return Hooks(
        evaluate=look.evaluate,
        count_words=look.word_error_rate,
        keep_best=keep_best,
        write=write,
        write_bad=write_bad,
        count_quarantined=quarantine.count,
        advance=(lambda step: None) if progress is None else progress.advance,
    )


def _tell_gap(run: RunConfig, gap: Gap) -> None:
    write_json(run.stage_folder("train") / GAP, gap.as_json())
    sys.stdout.write(gap_summary(gap))
    sys.stdout.flush()
    if gap.warning is not None:
        log.warning("event=gap_in_words warning=%r", gap.warning)


def _begin(run: RunConfig, checkpoints: Checkpoints, state: TrainingState) -> TrainingState:
    """Take back the stage's record and what training will replace, now that nothing stands against it."""
    begin_stage(run, "train")
    if state.step == 0:
        shutil.rmtree(run.stage_folder("train") / QUARANTINE, ignore_errors=True)
    return checkpoints.make_agree(state, is_sent_back=run.train.resume != "auto")


def _write(run: RunConfig, written: AsrModel | None, quantization: Quantization, results: dict[str, Any]) -> None:
    """Put the best decoder into an unsharded copy of the student; write that, and the stage's record."""
    assert written is not None, "rank 0 has the copy that is written"
    folder = run.stage_folder("train")
    weights = load_best(folder / BEST)
    stack = DecoderStack(written.decoder.layers)
    names = {name for name, _ in stack.named_parameters()}
    if set(weights) != names:
        raise CheckpointError(f"{folder / BEST} must hold all {len(names)} decoder weights, got {len(weights)}")
    stack.load_state_dict(weights, strict=False)  # the quantizers stay as they are
    save_student(written, quantization, folder / STUDENT, dtype=run.model.dtype)
    path = folder / LOSS_PICTURE
    with drawn_if_possible(path, log):
        draw_losses([json.loads(line) for line in (folder / METRICS).read_text().splitlines()], path)
    best = read_json(folder / BEST / STATE)  # not the state's: a kill may lie between the two
    told = {
        **results,
        "best_step": best["step"],
        "best_kl": best["kl_per_token"],
        "quantizer_sha256": quantizer_hash(written.model),
        "served_bytes": served_bytes(written.model),
    }
    finish_stage(run, "train", results=told)
    log.info(
        "event=finished stage=train best_step=%d heldout_kl=%.6f path=%s",
        *(best["step"], best["kl_per_token"], folder / STUDENT),
    )
