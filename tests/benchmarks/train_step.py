"""A program: one micro-batch from log-mels to the gradient of the student, by this project and by the usual loop.

    python -m tests.benchmarks.train_step [--rounds 5] [--dtype float32] [--device cuda]

On a CPU two layers of tower and decoder each in the real model's dimensions, on a GPU all of them, with random
weights; an INT8 student whose weights are off the teacher's, so that there is something to learn; clips of 3, 5, 8
and 12 s, each with 3.3 response tokens a second and 4. What the usual loop is, ``peer_loop.py`` says. Both attend
over the whole clip, which is what transformers' audio tower does under SDPA whatever the checkpoint says, and neither
has dropout.

First losses and gradients of all trained weights are compared, and operations are counted. Then all take turns. On a
CPU there is one thread, and what is counted is processor time; memory is what a fresh process needs for a step, at
most, beyond what it has before. This project, compiled, is to be at least 2.5 times as fast, and to need at most a
quarter of the memory. ``--device cuda`` also tells tokens and seconds of audio per second, and which share of the
GPU's speed the operations are that the step cannot do without (``qad_dist/distill/flops.py``).
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.collate import Example, collate
from qad_dist.asr.decoder import DecoderStack, compile_layers
from qad_dist.asr.load import AsrModel, load_model
from qad_dist.batch import Batch
from qad_dist.distill.flops import FRAMES_PER_SECOND, ModelShape, Work, step_flops
from qad_dist.distill.loss import distillation_loss
from qad_dist.distill.optim import choose_trainable
from qad_dist.pairing import join_models, share_frozen_parts
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.state import enabled_quantizers
from tests.benchmarks.fake_quant import cosine
from tests.benchmarks.kd_loss import RETURNING, most_memory, without_malloc
from tests.benchmarks.label import AUDIO_TOWER, DECODER, MORE_TOKENS, TOKENS_PER_SECOND
from tests.benchmarks.peer_loop import PaddedBatch, PeerLoop
from tests.benchmarks.read import MALLOC
from tests.helpers.quantized import calibrate
from tests.helpers.qwen import digit_mixes, mels_of, write_random_model

SECONDS = (3.0, 5.0, 8.0, 12.0)
LAYERS = {"cpu": (2, 2), "cuda": (28, 18)}
"""Of decoder and tower."""
COPIES = {"cpu": 1, "cuda": 16}
"""Clips of each length."""
PEAK_FLOPS = 790e12
"""Of bfloat16 products on an H200, as measured, not as advertised."""
OFF = 0.3
"""Standard deviations of a weight by which the student's differ from the teacher's."""
OURS, COMPILED, PEER = "this project", "this project, compiled", "usual loop"
SPEED_GOAL, MEMORY_GOAL = 2.5, 4.0


@dataclass(frozen=True, slots=True)
class Step:
    """One way to make a gradient."""

    backward: Callable[[], Tensor]
    """Mean KL over response tokens; the gradient is in the layers afterwards."""
    layers: nn.ModuleList


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    environment = RETURNING if options.memory_of else MALLOC
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, program(*sys.argv[1:]), os.environ | environment)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        teacher, student, batch = make_models(Path(folder), options.dtype, options.device)
    if options.memory_of:
        say(str(memory_of_step(make_steps(teacher, student, batch, only=options.memory_of)[options.memory_of])))
        return
    describe(teacher, student, batch)
    steps = make_steps(teacher, student, batch)
    count_operations(teacher, {name: steps[name] for name in (OURS, PEER)}, batch)
    compare(steps, options.dtype)
    taken = measure(steps, rounds=options.rounds, device=options.device)
    memory = {name: measure_memory(name, step, options) for name, step in steps.items()}
    report(taken, memory, flops=step_flops(shape_of(teacher), work_of(batch)), batch=batch, options=options)


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.train_step", *words]


def make_models(folder: Path, dtype: str, device: str) -> tuple[AsrModel, AsrModel, Batch]:
    """Teacher, quantized student and batch, on the device; the student's quantizers run ModelOpt's own code."""
    decoder_layers, tower_layers = LAYERS[device]
    tower = AUDIO_TOWER | {"encoder_layers": tower_layers, "num_hidden_layers": tower_layers}
    path = write_random_model(folder / "model", audio=tower, **(DECODER | {"num_hidden_layers": decoder_layers}))
    on_host = torch.device("cpu")
    teacher = load_model(path, dtype="float32", audio_attention="full", device=on_host)
    student = load_model(path, dtype="float32", audio_attention="full", device=on_host)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in student.decoder.layers.modules():
            if isinstance(module, nn.Linear):
                noise = torch.randn(module.weight.shape, generator=random)
                module.weight += OFF * module.weight.std() * noise
    batch = make_batch(teacher, copies=COPIES[device])
    calibrate(student, make_batch(teacher, copies=1), dtype=getattr(torch, dtype), alpha=1.0)
    for model in (teacher, student):
        model.model.to(getattr(torch, dtype)).to(device)
        model.model.requires_grad_(False)
    assert not any(quantizer.backend for _, quantizer in enabled_quantizers(student.model))
    return teacher, student, batch.to(torch.device(device))


def make_batch(model: AsrModel, *, copies: int) -> Batch:
    """Spoken digits with responses of random tokens."""
    random = np.random.default_rng(0)
    clips = digit_mixes([seconds for _ in range(copies) for seconds in SECONDS])
    examples = [
        Example(
            key=f"clip-{number}",
            mel_MF=mel_MF,
            response_ids=random.integers(200, size=response_length(mel_MF)).tolist(),
        )
        for number, mel_MF in enumerate(mels_of(model, clips))
    ]
    return collate(examples, prompt=model.prompt)


def response_length(mel_MF: Tensor) -> int:
    return round(TOKENS_PER_SECOND * mel_MF.shape[1] / FRAMES_PER_SECOND + MORE_TOKENS)


def make_steps(teacher: AsrModel, student: AsrModel, batch: Batch, *, only: str | None = None) -> dict[str, Step]:
    """All ways, or one, with equal weights; each has a student of its own."""
    names = [only] if only else [COMPILED, OURS, PEER]
    return {
        name: peer_step(teacher, student, batch)
        if name == PEER
        else own_step(teacher, student, batch, name == COMPILED)
        for name in names
    }


def own_step(teacher: AsrModel, student: AsrModel, batch: Batch, is_compiled: bool) -> Step:
    teacher, student = copied_layers(teacher), copied_layers(student)
    share_frozen_parts(teacher, student)
    use_fast_fake_quant(student.model)
    stack = DecoderStack(student.decoder.layers)
    choose_trainable(stack, train_norms=False)
    if is_compiled:
        compile_layers(teacher.decoder.layers, student.decoder.layers)
    models = join_models(teacher, student, stack)

    def backward() -> Tensor:
        stack.zero_grad()
        embedded = models.embed(batch)
        with torch.no_grad():
            teacher_RE = models.teacher_states(batch, embedded).rows_RD
        sums = distillation_loss(
            models.student_states(embedded).rows_RD,
            teacher_RE,
            models.head_VD,
            batch.targets_R,
            kl_weight_R=batch.kl_weight_R,
            ce_weight_R=None,
            temperature=1.0,
            chunk_rows=1024,
            teacher_head_VE=models.teacher_head_VE,
        )
        (sums.loss / batch.num_rows).backward()
        return sums.loss.detach() / batch.num_rows

    return Step(backward, student.decoder.layers)


def peer_step(teacher: AsrModel, student: AsrModel, batch: Batch) -> Step:
    teacher, student = copied_layers(teacher), copied_layers(student)
    for model in (teacher, student):
        for part in (model.model.thinker.audio_tower, model.model.thinker.model):
            part.config._attn_implementation = "sdpa"
    layers = student.decoder.layers
    choose_trainable(layers, train_norms=False)
    loop = PeerLoop(teacher.model, student.model)
    padded = PaddedBatch.from_packed(
        batch, padding_id=teacher.processor.tokenizer.pad_token_id, dtype=teacher.head_weight_VD.dtype
    )

    def backward() -> Tensor:
        layers.zero_grad()
        return loop.backward(padded)

    return Step(backward, layers)


def copied_layers(model: AsrModel) -> AsrModel:
    """A model of its own, but for the embedding and the head, which are large and never change."""
    weight = model.head_weight_VD
    return AsrModel(
        copy.deepcopy(model.model, {id(weight): weight}),
        *(model.processor, model.prompt, model.folder, model.audio_attention),
    )


def shape_of(model: AsrModel) -> ModelShape:
    config = model.model.config.thinker_config
    return ModelShape.from_configs(config.text_config, config.audio_config)


def work_of(batch: Batch) -> Work:
    """What the batch asks for, without padding."""
    lengths_U, frames_U = batch.cu_seqlens_U1.diff().tolist(), batch.mel_lengths_U.tolist()
    audio_tokens_U = [num_audio_tokens(frames) for frames in frames_U]
    return Work(
        tokens=batch.num_tokens,
        pairs=sum(length * (length + 1) // 2 for length in lengths_U),
        rows=batch.num_rows,
        audio_seconds=sum(frames_U) / FRAMES_PER_SECOND,
        audio_tokens=sum(audio_tokens_U),
        audio_pairs=sum(tokens**2 for tokens in audio_tokens_U),
    )


def describe(teacher: AsrModel, student: AsrModel, batch: Batch) -> None:
    padded = PaddedBatch.from_packed(batch, padding_id=0, dtype=torch.float32)
    quantizers = sum(1 for _ in enabled_quantizers(student.model))
    say(
        f"{batch.num_utterances} clips, {work_of(batch).audio_seconds:.1f} s, {batch.num_tokens} tokens, "
        f"{padded.num_positions} padded, {batch.num_rows} of responses; {len(teacher.decoder.layers)} decoder layers, "
        f"{len(teacher.audio_tower.layers)} of the tower, {quantizers} quantizers, {teacher.head_weight_VD.dtype}"
    )


def count_operations(teacher: AsrModel, steps: dict[str, Step], batch: Batch) -> None:
    expected = step_flops(shape_of(teacher), work_of(batch))
    say(f"operations by the formula: {expected / 1e9:.1f} GFLOP")
    for name, step in steps.items():
        # The others count nothing on a CPU, and not what they recompute.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step.backward()
        found = counter.get_total_flops()
        say(f"{name}: {found / 1e9:.1f} GFLOP, {found / expected:.3f} of the formula's")


def compare(steps: dict[str, Step], dtype: str) -> None:
    """The same loss and the same gradients, as far as rounding lets them be."""
    losses, gradients = {}, {}
    for name, step in steps.items():
        losses[name] = float(step.backward())
        gradients[name] = {name: p.grad.clone() for name, p in step.layers.named_parameters() if p.grad is not None}
    for name in steps:
        assert gradients[name].keys() == gradients[PEER].keys()
        least = min(cosine(gradients[name][part], gradients[PEER][part]) for part in gradients[PEER])
        say(f"{name}: loss {losses[name]:.6f}, least cosine of {len(gradients[name])} gradients {least:.6f}")
        assert abs(losses[name] / losses[PEER] - 1) < (0.02 if dtype == "bfloat16" else 1e-3)
        assert least > (0.995 if dtype == "bfloat16" else 0.9999)


def measure(steps: dict[str, Step], *, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each: of the processor, or of the GPU."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    for step in steps.values():
        step.backward()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begun = now()
            step.backward()
            taken[name].append(now() - begun)
    return taken


def memory_of_step(step: Step) -> int:
    """Bytes, once everything is compiled and no gradient is there."""
    step.backward()
    step.layers.zero_grad()
    return most_memory(step.backward)


def measure_memory(name: str, step: Step, options: argparse.Namespace) -> int:
    """Bytes at most beyond those before the step: on a CPU in a process of its own."""
    if options.device == "cuda":
        step.layers.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.backward()
        most = torch.cuda.max_memory_allocated() - before
        step.layers.zero_grad()
        return most
    words = program("--memory-of", name, "--dtype", options.dtype)
    ended = subprocess.run(words, env=without_malloc() | RETURNING, capture_output=True, text=True, check=True)
    return int(ended.stdout.split()[-1])


def report(
    taken: dict[str, list[float]],
    memory: dict[str, int],
    *,
    flops: float,
    batch: Batch,
    options: argparse.Namespace,
) -> None:
    least, median = ({name: float(choose(taken[name])) for name in taken} for choose in (np.min, np.median))
    on_gpu = options.device == "cuda"
    more = " tokens/s | audio s/s | share of peak |" if on_gpu else ""
    say(f"\n| | smallest, s | median, s | usual loop's smallest / its | median / its | memory, GB |{more}")
    say("|---|---|---|---|---|---|" + "---|---|---|" * on_gpu)
    for name in taken:
        ratios = f"{least[PEER] / least[name]:.2f} | {median[PEER] / median[name]:.2f}"
        line = f"| {name} | {least[name]:.3f} | {median[name]:.3f} | {ratios} | {memory[name] / 1e9:.2f} |"
        if on_gpu:
            speeds = (batch.num_tokens / median[name], work_of(batch).audio_seconds / median[name])
            line += f" {speeds[0]:.0f} | {speeds[1]:.0f} | {flops / median[name] / PEAK_FLOPS:.3f} |"
        say(line)
    load = f"load average {os.getloadavg()[0]:.1f}"
    where = torch.cuda.get_device_name() if on_gpu else "one thread"
    say(f"\n{options.rounds} rounds in turn, {options.dtype}, {where}, {load}")
    for what, ratio, goal in (
        ("speed", median[PEER] / median[COMPILED], SPEED_GOAL),
        ("memory", memory[PEER] / memory[COMPILED], MEMORY_GOAL),
    ):
        say(f"{what}: {ratio:.2f} times, to be {goal}: {'kept' if ratio >= goal else 'MISSED'}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
