"""train: quantization-aware distillation. The teacher is whole on every rank, the student's decoder is sharded."""

import logging
import math
import shutil
from typing import Any

import torch

from qad_dist.asr.dataset import LabelledSet, PlannedBatches, languages_of
from qad_dist.asr.decoder import DecoderStack
from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.config import RunConfig
from qad_dist.distill.checkpoint import (
    BEST,
    STATE,
    Checkpoints,
    TrainingState,
    load_best,
    save_best,
)
from qad_dist.distill.evaluate import Evaluation, evaluate
from qad_dist.distill.loop import Hooks, train
from qad_dist.distill.metrics import MetricsFile
from qad_dist.distill.optim import choose_trainable, parameter_groups
from qad_dist.heldout import heldout_batches, heldout_set
from qad_dist.labelling import read_used_labels
from qad_dist.pairing import join_models, load_student, save_student
from qad_dist.quant.state import Quantization, quantizer_hash, served_bytes
from qad_dist.runtime.collectives import all_gather_objects, run_on_main
from qad_dist.runtime.engine import Engine
from qad_dist.runtime.quarantine import QUARANTINE, open_quarantine
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import DONE, STUDENT, WITHOUT_EFFECT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import World, check_enough_work, check_micro_batches, device_for, joined_world
from qad_dist.runtime.zero import read_deepspeed_settings
from shards.errors import CheckpointError, ModelError
from shards.mixture import Mixture
from shards.plan import Plan
from shards.schema import HELDOUT, TRAIN
from shards.storage import fingerprint, read_json, settle_interrupted, verify_manifest
from shards.workers import Reader

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 1800


def run(run: RunConfig) -> None:
    """Distil, keep the student that is nearest to the teacher on the held-out split, write ``<run>/train/student``.

    Raises:
        QadError: An earlier stage is missing, a checkpoint does not fit, a loss is no number, or more utterances than
            ``read.max_quarantined_share`` cannot be read.
    """
    settings = read_deepspeed_settings(run.train.deepspeed)
    with joined_world(TIMEOUT_SECONDS) as world:
        check_micro_batches(world, run.train.micro_batches_per_step)
        quantized = require_stage(run, "quantize")
        ptq_folder = run.stage_folder("quantize") / STUDENT
        run_on_main(lambda: verify_manifest(ptq_folder))
        # Models first: under ZeRO-3 every from_pretrained after the engine's plugin exists would be partitioned.
        teacher = load_teacher(run.model, device_for(world))
        student, quantization = load_student(run, ptq_folder, device_for(world))
        base = load_student(run, ptq_folder, torch.device("cpu"))[0] if world.is_main else None
        _check_quantizer_hash(student, quantized["results"]["quantizer_sha256"])
        _share_frozen_parts(teacher, student)
        with open_reader(run) as reader:
            training, heldout = _labelled_sets(run, teacher, reader)
            check_enough_work(world, len(training.rows), stage="train")
            plan = training_plan(run, training)
            state = _initial_state(run, settings, plan, training, heldout, world)
            stack = DecoderStack(student.decoder.layers)
            choose_trainable(stack, train_norms=run.train.train_norms)
            engine = Engine(
                stack,
                lambda module: make_optimizer(run, module),
                settings=settings,
                world=world,
                dtype=getattr(torch, run.model.dtype),
                clip_norm=run.train.clip_norm,
                trackers=list(run.train.trackers),
                tracker_folder=run.stage_folder("train"),
            )
            _check_quantizer_hash(student, quantized["results"]["quantizer_sha256"])
            state, num_quarantined = _distil(run, engine, teacher, student, plan, training, heldout, state, world)
        run_on_main(lambda: _write(run, base, quantization, state, num_quarantined))
        engine.close()


def dry_run(run: RunConfig) -> None:
    """Say what would be trained."""
    settings = read_deepspeed_settings(run.train.deepspeed)
    log.info(
        "event=dry_run stage=train zero_stage=%d steps=%d tokens_per_step=%d",
        *(settings["zero_optimization"]["stage"], run.train.steps),
        run.train.micro_batch_tokens * run.train.micro_batches_per_step,
    )


def make_optimizer(run: RunConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as the run's settings say; fused where there is CUDA."""
    return torch.optim.AdamW(
        parameter_groups(module.parameters(), weight_decay=run.train.weight_decay),
        lr=run.train.learning_rate,
        betas=(run.train.beta1, run.train.beta2),
        fused=torch.cuda.is_available(),
    )


def _check_quantizer_hash(student: AsrModel, expected: str) -> None:
    """Every rank has the quantizers that were calibrated: loading and the engine change parameters, never these."""
    for rank, digest in enumerate(all_gather_objects(quantizer_hash(student.model))):
        if digest != expected:
            raise ModelError(
                f"the quantizers of rank {rank} must be those that quantize wrote ({expected[:12]}), got "
                f"{digest[:12]}; run quantize again"
            )


def _share_frozen_parts(teacher: AsrModel, student: AsrModel) -> None:
    """Check that what is frozen is equal in both models, and keep the teacher's: it exists once on a rank."""
    theirs, ours = student.model.thinker, teacher.model.thinker
    parts = {
        "audio tower": (ours.audio_tower, theirs.audio_tower),
        "embeddings": (ours.model.embed_tokens, theirs.model.embed_tokens),
        "final norm": (ours.model.norm, theirs.model.norm),
        "LM head": (ours.lm_head, theirs.lm_head),
    }
    for part, (kept, dropped) in parts.items():
        weights = dict(dropped.named_parameters())
        for name, weight in kept.named_parameters():
            if not torch.equal(weight, weights[name]):
                raise ModelError(
                    f"teacher and student must share their {part}, got other values of {name}; run quantize again"
                )
    theirs.audio_tower, theirs.lm_head = ours.audio_tower, ours.lm_head
    theirs.model.embed_tokens, theirs.model.norm = ours.model.embed_tokens, ours.model.norm


def _labelled_sets(run: RunConfig, teacher: AsrModel, reader: Reader) -> tuple[LabelledSet, LabelledSet]:
    labelled = read_used_labels(run, TRAIN)
    prompt = teacher.prompt.with_context(run.label.context)
    training = LabelledSet(labelled.rows, reader=reader, prompt=prompt, extractor=teacher.extractor)
    heldout, held = heldout_set(run, teacher, reader, max_utterances=run.train.evaluate_utterances)
    for split, dataset, dropped in ((TRAIN, training, labelled.dropped), (HELDOUT, heldout, held.dropped)):
        log.info(
            "event=dataset split=%s utterances=%d audio_hours=%.3f tokens=%d dropped=%s",
            *(split, len(dataset.rows), dataset.seconds.sum() / 3600, dataset.num_tokens.sum(), dict(dropped)),
        )
    return training, heldout


def _initial_state(
    run: RunConfig, settings: dict[str, Any], plan: Plan, training: LabelledSet, heldout: LabelledSet, world: World
) -> TrainingState:
    """The state before the first step, with the fingerprint of everything that decides the course of training."""
    quantized = read_json(run.stage_folder("quantize") / DONE)
    mark = fingerprint(
        run.seed,
        run.train.model_dump(mode="json", exclude=WITHOUT_EFFECT["train"]),
        settings,
        [plan.fingerprint(), training.fingerprint(), heldout.fingerprint()],
        quantized["fingerprint"],
    )
    return TrainingState(
        step=0,
        best_step=-1,
        best_kl=math.inf,
        world_size=world.world_size,
        zero_stage=settings["zero_optimization"]["stage"],
        fingerprint=mark,
    )


def _distil(
    run: RunConfig,
    engine: Engine,
    teacher: AsrModel,
    student: AsrModel,
    plan: Plan,
    training: LabelledSet,
    heldout: LabelledSet,
    state: TrainingState,
    world: World,
) -> tuple[TrainingState, int]:
    """The state behind the last step, and how many utterances could not be read."""
    folder = run.stage_folder("train")
    models = join_models(teacher, student, engine)
    checkpoints = Checkpoints(folder, keep=run.train.keep_checkpoints)
    run_on_main(lambda: settle_interrupted(folder))  # a checkpoint may have no name but its retired one
    if path := run_on_main(lambda: checkpoints.choose(run.train.resume)):
        state = checkpoints.load(engine, path, expected=state)
        log.info("event=resumed step=%d path=%s", state.step, path)
    state = run_on_main(lambda: _begin(run, checkpoints, state))
    quarantine = open_quarantine(run, world, num_utterances=len(training.rows) + len(heldout.rows))
    log.info(
        "event=engine type=%s zero_stage=%d ranks=%d trained_weights=%d",
        *(engine.distributed_type, engine.stage, world.world_size, _num_trained(student)),
    )
    metrics = MetricsFile(folder / "metrics.jsonl", resumed_step=state.step) if world.is_main else None
    engine.start_trackers("qad", {"learning_rate": run.train.learning_rate, "steps": run.train.steps})

    def write(step: int, values: dict[str, float]) -> None:
        if metrics is not None:
            metrics.write(step, values)
        engine.track(values, step=step)

    def keep_best(step: int, evaluation: Evaluation) -> None:
        weights = engine.gather_weights()
        run_on_main(lambda: save_best(folder / BEST, weights, step=step, kl_per_token=evaluation.kl_per_token))

    def evaluate_student() -> Evaluation:
        budget = run.train.micro_batch_tokens
        batches = heldout_batches(heldout, run, world, token_budget=budget, on_damaged=quarantine.add)
        return evaluate(models, batches, chunk_rows=run.train.loss_chunk_rows)

    hooks = Hooks(evaluate=evaluate_student, keep_best=keep_best, write=write, count_quarantined=quarantine.count)
    with PlannedBatches(training, plan, world, steps=run.train.steps, on_damaged=quarantine.add) as batches:
        state = train(engine, models, batches, run.train, state=state, checkpoints=checkpoints, hooks=hooks)
    return state, quarantine.count()


def training_plan(run: RunConfig, training: LabelledSet) -> Plan:
    """The steps of all ranks; tells how the languages are mixed, if not as they come."""
    codes, languages = languages_of(training.rows, detected_first=True)
    mixture = Mixture(
        codes,
        training.seconds,
        temperature=run.train.language_temperature,
        max_hours_per_language=run.train.max_hours_per_language,
    )
    if run.train.language_temperature > 1 or run.train.max_hours_per_language is not None:
        for part in mixture.shares():
            log.info(
                "event=mixture language=%s audio_hours=%.3f hours_per_epoch=%.3f share=%.4f times=%.3f",
                *(languages[part.language], part.hours, part.hours_per_epoch, part.share, part.times),
            )
    return Plan(
        training.num_tokens,
        audio_seconds=training.seconds,
        mixture=mixture,
        seed=run.seed,
        token_budget=run.train.micro_batch_tokens,
        micro_batches_per_step=run.train.micro_batches_per_step,
    )


def _begin(run: RunConfig, checkpoints: Checkpoints, state: TrainingState) -> TrainingState:
    """Take back the stage's record and what training will replace, now that nothing stands against it."""
    begin_stage(run, "train")
    if state.step == 0:
        shutil.rmtree(run.stage_folder("train") / QUARANTINE, ignore_errors=True)
    return checkpoints.make_agree(state, is_sent_back=run.train.resume != "auto")


def _num_trained(student: AsrModel) -> int:
    # Under ZeRO-3 a parameter holds a part of itself; ds_numel is its whole size.
    trained = (p for p in student.decoder.layers.parameters() if p.requires_grad)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)


def _write(
    run: RunConfig, base: AsrModel | None, quantization: Quantization, state: TrainingState, num_quarantined: int
) -> None:
    """Put the best decoder into an unsharded copy of the student and write that as a checkpoint."""
    if base is None:
        raise CheckpointError("rank 0 must hold the copy that is written, got another rank; please report this")
    folder = run.stage_folder("train")
    weights = load_best(folder / BEST)
    names = {name for name, _ in DecoderStack(base.decoder.layers).named_parameters()}
    if set(weights) != names:
        raise CheckpointError(f"{folder / BEST} must hold all {len(names)} decoder weights, got {len(weights)}")
    DecoderStack(base.decoder.layers).load_state_dict(weights, strict=False)  # the quantizers stay as they are
    save_student(base, quantization, folder / STUDENT, dtype=run.model.dtype)
    best = read_json(folder / BEST / STATE)  # not the state's: a kill may lie between the two
    results = {
        "step": state.step,
        "best_step": best["step"],
        "best_kl": best["kl_per_token"],
        "world_size": state.world_size,
        "zero_stage": state.zero_stage,
        "quarantined": num_quarantined,
        "quantizer_sha256": quantizer_hash(base.model),
        "served_bytes": served_bytes(base.model),
    }
    finish_stage(run, "train", results=results)
    log.info(
        "event=finished stage=train best_step=%d heldout_kl=%.6f path=%s",
        *(best["step"], best["kl_per_token"], folder / STUDENT),
    )
