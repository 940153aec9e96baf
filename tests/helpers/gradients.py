"""A program: gradients of one global batch under every engine, and by plain autograd; what a step changes.

    accelerate launch ... tests/helpers/gradients.py RANKS CONFIG RUN_FOLDER FOLDER

The run is labelled and quantized. FOLDER gets, from rank 0: ``<case>.safetensors`` (whole gradients) and
``report.json``. Models, optimizer, engine, batches and loop are those of ``qad_dist.stages.train``.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch import Tensor

from qad_dist.asr.dataset import LabelledSet, PlannedBatches
from qad_dist.asr.decoder import DecoderStack, EmbeddedBatch, embed, layer_states
from qad_dist.asr.load import AsrModel, load_model, load_teacher
from qad_dist.batch import Batch
from qad_dist.config import RunConfig, load_run
from qad_dist.distill.evaluate import evaluate
from qad_dist.distill.loop import accumulate_gradient
from qad_dist.distill.optim import choose_trainable
from qad_dist.distill.window import Window
from qad_dist.heldout import heldout_batches, heldout_set
from qad_dist.labelling import read_used_labels
from qad_dist.pairing import join_models, share_frozen_parts
from qad_dist.quant.state import enable_checkpointing, quantizer_hash
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.engine import Engine, build_engine
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.world import World, current_world, exit_rank, join_world
from qad_dist.stages import train
from shards.plan import Plan
from shards.schema import TRAIN
from tests.helpers.engines import KINDS
from tests.helpers.launching import ROOT

CPU = torch.device("cpu")
CE_WEIGHT, HIDDEN_WEIGHT = 0.3, 2.0
SMALL_STEPS, SMALL_RATE = 8, 5e-5
"""Of the bfloat16 case: each step is below half a unit in the last place of the weights that are looked at."""


def main(ranks: str, config: str, run_folder: str, folder: str) -> None:
    # No workers: each would import all that this program imports.
    train_changes = [f"train.ce_weight={CE_WEIGHT}", f"train.hidden_weight={HIDDEN_WEIGHT}"]
    changes = [f"run={run_folder}", *train_changes, "read.workers=0"]
    run, world = load_run(config, changes), current_world()
    configure_logging(world)
    join_world(world, 600)
    # All models first: once a ZeRO-3 plugin exists, whatever is loaded is partitioned.
    enable_checkpointing()
    teacher = load_teacher(run.model, CPU)
    students = {kind: _load_student(run, teacher, "float32") for kind in KINDS}
    for student in students.values():
        _move_away(student)
    rounded_teacher = load_teacher(run.model, CPU, dtype="bfloat16")
    rounded = {kind: _load_student(run, rounded_teacher, "bfloat16") for kind in KINDS}
    reader = open_reader(run)
    prompt = teacher.prompt.with_context(run.label.context)
    labelled = read_used_labels(run, TRAIN)
    training = LabelledSet(labelled.rows, reader=reader, prompt=prompt, extractor=teacher.extractor)
    heldout, _ = heldout_set(run, teacher, reader, max_utterances=run.train.evaluate_utterances)
    plan = _unequal_plan(run, training)
    data = PlannedBatches(training, plan, world, steps=1)
    batches = [training.batch(indices) for indices in plan.step(0)]

    report: dict[str, Any] = {"plain": _plain(run, batches, heldout, teacher, students["zero1"], world, Path(folder))}
    for name, student in students.items():
        report[name] = _under_engine(run, name, data, teacher, student, world, Path(folder))
    for name, student in rounded.items():
        report[f"bfloat16 {name}"] = _many_small_steps(run, name, data, rounded_teacher, student, world)
    assert report["zero3"]["engine"][2] == int(ranks)
    if world.is_main:
        (Path(folder) / "report.json").write_text(json.dumps(report, indent=1))
    reader.close()
    exit_rank(0)


def _load_student(run: RunConfig, teacher: AsrModel, dtype: str) -> AsrModel:
    folder = run.stage_folder("quantize") / train.STUDENT
    student = load_model(folder, dtype=dtype, audio_attention="windowed", device=CPU, quantized=True)
    share_frozen_parts(teacher, student)
    return student


def _move_away(student: AsrModel) -> None:
    """Noise of a fifth of their size on the decoder's weights: a KL near 0 has a gradient of rounding errors."""
    random = torch.Generator().manual_seed(0)
    for parameter in student.decoder.layers.parameters():
        if parameter.ndim > 1:
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=random)


def _unequal_plan(run: RunConfig, training: LabelledSet) -> Plan:
    """The first seed's whose first micro-batches have three numbers of rows: labels differ a little by machine."""
    for seed in range(run.seed, run.seed + 100):
        plan = Plan(
            training.num_tokens,
            seed=seed,
            token_budget=run.train.micro_batch_tokens,
            micro_batches_per_step=run.train.micro_batches_per_step,
        )
        if len({training.batch(indices).num_rows for indices in plan.step(0)}) == 3:
            return plan
    raise AssertionError("no seed makes three unequal micro-batches")


def _plain(
    run: RunConfig,
    batches: list[Batch],
    heldout: LabelledSet,
    teacher: AsrModel,
    student: AsrModel,
    world: World,
    folder: Path,
) -> dict[str, Any]:
    """The reference: no engine; all logits at once; one backward over the rows and tokens of all micro-batches."""
    stack = DecoderStack(student.decoder.layers, keeps_all=True)
    choose_trainable(stack, train_norms=False)
    embedded = [embed(teacher, batch) for batch in batches]
    rows_N = torch.cat([_is_response(batch) for batch in batches])
    student_LND = _all_states(stack, embedded)
    with torch.no_grad():
        teacher_LND = _all_states(DecoderStack(teacher.decoder.layers, keeps_all=True), embedded)
    norm, head_VD = teacher.decoder.norm, teacher.head_weight_VD
    student_RV, teacher_RV = (norm(states[-1][rows_N]) @ head_VD.T for states in (student_LND, teacher_LND))
    kl = F.kl_div(student_RV.log_softmax(1), teacher_RV.log_softmax(1), log_target=True, reduction="sum")
    ce = F.cross_entropy(student_RV, torch.cat([batch.targets_R for batch in batches]), reduction="sum")
    distance_LN = ((student_LND - teacher_LND).norm(dim=2) / teacher_LND.norm(dim=2)) ** 2
    ((kl + CE_WEIGHT * ce) / len(student_RV) + HIDDEN_WEIGHT * distance_LN.mean()).backward()
    gradients = {name: p.grad.clone() for name, p in stack.named_parameters() if p.grad is not None}
    stack.zero_grad(set_to_none=True)
    student.model.requires_grad_(False)
    if world.is_main:
        save_file(gradients, folder / "plain.safetensors")
    held = heldout_batches(heldout, run, world, token_budget=run.train.micro_batch_tokens)
    evaluation = evaluate(join_models(teacher, student, stack), held, chunk_rows=64)
    return {
        "rows": [batch.num_rows for batch in batches],
        "evaluation": asdict(evaluation),
        "quantizers": quantizer_hash(student.model),
    }


def _is_response(batch: Batch) -> Tensor:
    """``[N]``: what the response rows are, as a mask."""
    return torch.zeros(len(batch.input_ids_N), dtype=torch.bool).index_fill_(0, batch.rows_R, True)


def _all_states(stack: DecoderStack, embedded: list[EmbeddedBatch]) -> Tensor:
    """``[L, N, D]``: behind every layer, of all micro-batches one after another."""
    return torch.cat([torch.stack(layer_states(stack, part)) for part in embedded], dim=1)


def _build(run: RunConfig, student: AsrModel, kind: str, world: World, dtype: torch.dtype) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one plugin in a process
    GradientState._reset_state()
    stack = DecoderStack(student.decoder.layers, keeps_all=run.train.compares_layers)
    choose_trainable(stack, train_norms=run.train.train_norms)
    return build_engine(
        stack,
        lambda module: train.make_optimizer(run, module),
        deepspeed=None if kind == "ddp" else str(ROOT / "configs" / "deepspeed" / f"{kind}.json"),
        world=world,
        dtype=dtype,
        clip_norm=run.train.clip_norm,
    )


def _under_engine(
    run: RunConfig, name: str, data: PlannedBatches, teacher: AsrModel, student: AsrModel, world: World, folder: Path
) -> dict[str, Any]:
    engine = _build(run, student, name, world, torch.float32)
    models = join_models(teacher, student, engine, compares_layers=True)
    frozen = _frozen_hash(teacher, student)
    built = all_gather_objects(quantizer_hash(student.model))
    before = engine.gather_weights()
    own = list(data.micro_batches(0))
    window = Window(CPU, run.train)
    finite = accumulate_gradient(engine, models, data, run.train, step=0, window=window)
    gradients = engine.full_gradients()
    engine.step(learning_rate=1e-3, is_finite=finite)
    after = engine.gather_weights()
    if world.is_main:
        save_file(gradients, folder / f"{name}.safetensors")
    outside = [*teacher.model.parameters(), *(p for p in student.model.parameters() if not p.requires_grad)]
    return {
        "engine": [engine.name, engine.distributed_type, dist.get_world_size()],
        "micro_batches": all_gather_objects([batch.weighted_rows for batch in own]),
        "frozen_with_gradient": sum(parameter.grad is not None for parameter in outside),
        "frozen_is_unchanged": _frozen_hash(teacher, student) == frozen,
        "quantizers_of_ranks": built + all_gather_objects(quantizer_hash(student.model)),
        "weights": sorted(before),
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "gradient_norm": engine.gradient_norm(),
        "skipped": engine.num_skipped(),
    }


def _many_small_steps(
    run: RunConfig, name: str, data: PlannedBatches, teacher: AsrModel, student: AsrModel, world: World
) -> dict[str, Any]:
    """Weights of at least 1/16 in bfloat16 lie 2^-11 and more apart: one small step alone cannot move them."""
    engine = _build(run, student, name, world, torch.bfloat16)
    models = join_models(teacher, student, engine)
    # Far from the teacher's doubts the gradient keeps its sign over the small steps; the KL's, near 0, would not.
    ce_only = run.train.model_copy(update={"kl_weight": 0.0, "ce_weight": 1.0, "hidden_weight": 0.0})
    trained = [n for n, parameter in engine.module.named_parameters() if parameter.requires_grad]
    start = engine.gather_weights()  # on rank 0, like all that follows of weights
    large = {n: start[n].abs() >= 2**-4 for n in trained if start}
    moved = []
    window = Window(CPU, run.train)
    for _ in range(SMALL_STEPS):
        finite = accumulate_gradient(engine, models, data, ce_only, step=0, window=window)
        engine.step(learning_rate=SMALL_RATE, is_finite=finite)
        weights = engine.gather_weights()
        moved.append(sum(int(((weights[n] != start[n]) & large[n]).sum()) for n in large))
    masters = {name: state["weight"] for name, state in engine.trained_state()}
    return {
        "engine": [engine.name, engine.distributed_type, dist.get_world_size()],
        "weight_dtypes": sorted({str(parameter.dtype) for parameter in engine.module.parameters()}),
        "master_dtypes": sorted({str(master.dtype) for master in masters.values()}),
        "masters": sorted(masters),
        "weights_that_are_not_their_master": sum(
            int((masters[n].to(torch.bfloat16) != weights[n]).sum()) for n in large
        ),
        "large_weights": sum(int(mask.sum()) for mask in large.values()),
        "moved": moved,
    }


def _frozen_hash(teacher: AsrModel, student: AsrModel) -> str:
    """Of everything that training must leave alone: the teacher, and the student outside its decoder layers."""
    digest = hashlib.sha256()
    for model in (teacher, student):
        for name, parameter in model.model.named_parameters():
            if model is teacher or ".layers." not in name or "audio_tower" in name:
                digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
