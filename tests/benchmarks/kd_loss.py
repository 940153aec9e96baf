"""A program: the distillation loss and its gradient, by this project, by ModelOpt and by Liger.

    python -m tests.benchmarks.kd_loss [--rounds 5] [--liger FOLDER]

Hidden states of four padded utterances of 129 positions in bfloat16, of which 104 of 512 rows are of responses (20 %),
a frozen head of 151,936 x 1,024, KL at temperature 1. From hidden states to their gradient:

* ModelOpt: ``KDTrainer._standard_kd_loss`` itself, on logits of all positions, as it is given them.
* Liger: ``LigerFusedLinearJSDLoss`` with beta 0, which is the same KL, without its cross-entropy, on all rows at once
  (of 128 and 512 the faster chunk), not compiled and compiled. ``pip install --no-deps --target FOLDER liger-kernel``
  puts it where ``--liger`` looks; it is no dependency of this project. Without it, its rows are left out.

One thread, one process; what is counted is processor time. First losses and gradients are compared with those of
float64, at the rows of responses. Then all take turns. Rows of the table that end in "on response rows" do what their
authors did not: select the rows first. Memory is what a fresh process needs beyond its start, at most. This project is
to be 6 times as fast as ModelOpt, 4 times as fast as Liger, and to need a tenth of ModelOpt's memory.
"""

import argparse
import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from modelopt.torch.distill.losses import LogitsDistillationLoss
from modelopt.torch.distill.plugins.huggingface import KDTrainer
from torch import Tensor

from qad_dist.distill.loss import distillation_loss
from tests.benchmarks.read import MALLOC

VOCABULARY, WIDTH = 151_936, 1024
UTTERANCES, POSITIONS, RESPONSE = 4, 129, 26
"""Of each utterance the last 26 positions are predicted as response."""
LIGER_ROWS, FEWER_ROWS = 512, 128
IGNORED = -100
OURS, MODELOPT = "this project", "ModelOpt"
LIGER, LIGER_COMPILED, LIGER_FEWER = "Liger", "Liger, compiled", f"Liger, {FEWER_ROWS} rows at once"
ON_ROWS = " on response rows"
SPEED_GOALS, MEMORY_GOAL = {MODELOPT: 6.0, LIGER: 4.0}, 10.0

# Of the allocator, where memory is measured: what is freed goes back to the system, so that the highest value is true.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

Variant = Callable[["Inputs"], Tensor]
"""Computes the mean KL over response rows, with the gradient of the student's states behind it."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the losses read, bfloat16; labels are int64, ignored where nothing is to be learned."""

    student_BTD: Tensor
    teacher_BTD: Tensor
    head_VD: Tensor
    labels_BT: Tensor

    @property
    def rows_R(self) -> Tensor:
        """Of positions as if packed: those whose next token is of a response."""
        shifted_BT = F.pad(self.labels_BT[:, 1:], (0, 1), value=IGNORED)
        return (shifted_BT.flatten() != IGNORED).nonzero().squeeze(1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--liger", type=Path, help="folder that liger-kernel was installed to")
    arguments.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    environment = RETURNING if options.memory_of else MALLOC
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, program(*sys.argv[1:]), os.environ | environment)
    torch.set_num_threads(1)
    variants = make_variants(options.liger)
    inputs = random_inputs()
    if options.memory_of:
        say(str(most_memory(lambda: run(variants[options.memory_of], inputs))))
        return
    if LIGER not in variants:
        say("Liger is not installed (see --help): its rows are left out")
    compare(variants, inputs)
    measure(variants, inputs, rounds=options.rounds, liger=options.liger)


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.kd_loss", *words]


def random_inputs() -> Inputs:
    """The student's states are the teacher's, off by a tenth; logits have a spread of 3."""
    random = torch.Generator().manual_seed(0)
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=random).mul_(0.02).bfloat16()
    teacher_BTD = 4.7 * torch.randn(UTTERANCES, POSITIONS, WIDTH, generator=random)
    student_BTD = teacher_BTD + 0.47 * torch.randn(UTTERANCES, POSITIONS, WIDTH, generator=random)
    labels_BT = torch.full((UTTERANCES, POSITIONS), IGNORED)
    labels_BT[:, -RESPONSE:] = torch.randint(VOCABULARY, (UTTERANCES, RESPONSE), generator=random)
    return Inputs(student_BTD.bfloat16(), teacher_BTD.bfloat16(), head_VD, labels_BT)


def make_variants(liger: Path | None) -> dict[str, Variant]:
    variants: dict[str, Variant] = {
        OURS: loss_of_this_project,
        MODELOPT: loss_of_modelopt,
        MODELOPT + ON_ROWS: lambda inputs: loss_of_modelopt(inputs, only_rows=True),
    }
    if liger:
        sys.path.append(str(liger))
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return variants
    for name, rows, compiled in (
        (LIGER, LIGER_ROWS, False),
        (LIGER_COMPILED, LIGER_ROWS, True),
        (LIGER_FEWER, FEWER_ROWS, False),
    ):
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=rows
        )
        variants[name] = lambda inputs, loss=loss: loss_of_liger(loss, inputs)
        if name == LIGER:
            variants[LIGER + ON_ROWS] = lambda inputs, loss=loss: loss_of_liger(loss, inputs, only_rows=True)
    return variants


def loss_of_this_project(inputs: Inputs) -> Tensor:
    rows_R = inputs.rows_R
    student_RD, teacher_RD = (
        states_BTD.flatten(0, 1).index_select(0, rows_R) for states_BTD in (inputs.student_BTD, inputs.teacher_BTD)
    )
    ones_R = torch.ones(len(rows_R))
    sums = distillation_loss(
        student_RD,
        teacher_RD,
        inputs.head_VD,
        inputs.labels_BT[:, 1:][inputs.labels_BT[:, 1:] != IGNORED],
        kl_weight_R=ones_R,
        ce_weight_R=torch.zeros_like(ones_R),
        temperature=1.0,
        chunk_rows=1024,
    )
    return sums.loss / len(rows_R)


def loss_of_modelopt(inputs: Inputs, *, only_rows: bool = False) -> Tensor:
    """The models' head on all positions (``transformers`` leaves none out in training), then ModelOpt's own method."""
    student, teacher, labels = _selected(inputs) if only_rows else (inputs.student_BTD, inputs.teacher_BTD, None)
    with torch.no_grad():
        teacher_logits = teacher @ inputs.head_VD.T
    trainer = SimpleNamespace(
        _kd_criterion=LogitsDistillationLoss(temperature=1.0, reduction="none"),
        _last_teacher_outputs=SimpleNamespace(logits=teacher_logits),
    )
    del teacher_logits  # the method lets go of its own, and would not be alone with them
    outputs = SimpleNamespace(logits=student @ inputs.head_VD.T)
    return KDTrainer._standard_kd_loss(trainer, outputs, inputs.labels_BT if labels is None else labels)


def loss_of_liger(loss: Any, inputs: Inputs, *, only_rows: bool = False) -> Tensor:
    """Shifted as ModelOpt shifts for it. The head asks for a gradient, or the loss would fail in backward."""
    student, teacher, labels = _selected(inputs) if only_rows else (inputs.student_BTD, inputs.teacher_BTD, None)
    labels = inputs.labels_BT if labels is None else labels
    student, teacher = (states[..., :-1, :].reshape(-1, WIDTH) for states in (student, teacher))
    return loss(student, inputs.head_VD, teacher, inputs.head_VD, labels[..., 1:].flatten())


def _selected(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of responses alone, with one behind them that the shift takes off."""
    rows_R = F.pad(inputs.rows_R, (0, 1))
    student_1RD, teacher_1RD = (s.flatten(0, 1)[rows_R][None] for s in (inputs.student_BTD, inputs.teacher_BTD))
    labels_R = F.pad(inputs.labels_BT[inputs.labels_BT != IGNORED], (1, 0), value=IGNORED)
    return student_1RD, teacher_1RD, labels_R[None]


def run(variant: Variant, inputs: Inputs) -> tuple[float, Tensor]:
    """Loss, and gradient of the student's states."""
    inputs.student_BTD.requires_grad_(True).grad = None
    loss = variant(inputs)
    loss.backward()
    gradient_BTD = inputs.student_BTD.grad
    assert gradient_BTD is not None
    return loss.item(), gradient_BTD


def compare(variants: dict[str, Variant], inputs: Inputs) -> None:
    rows_R = inputs.rows_R
    expected, expected_RD = loss_by_definition(inputs)
    say(f"loss by float64: {expected:.6f} nats\n\n| | loss | gradient off by, of its norm |\n|---|---|---|")
    for name, variant in variants.items():
        loss, gradient_BTD = run(variant, inputs)
        found_RD = gradient_BTD.flatten(0, 1)[rows_R].double()
        off = float((found_RD - expected_RD).norm() / expected_RD.norm())
        say(f"| {name} | {loss:.6f} | {off:.1e} |")
        assert abs(loss - expected) < 0.05 * expected, f"{name}: loss must be {expected}, got {loss}"
        # The others round logits to bfloat16, which is as large as a tenth of what tells these two models apart.
        assert off < (0.01 if name == OURS else 0.2), f"{name}: gradients must agree, got {off} off"
        assert int((gradient_BTD.flatten(0, 1).abs().sum(-1) > 0).sum()) == len(rows_R), f"{name}: other rows learn"


@torch.no_grad()
def loss_by_definition(inputs: Inputs) -> tuple[float, Tensor]:
    """The loss and, at the rows of responses, its gradient, in float64."""
    rows_R, head_VD = inputs.rows_R, inputs.head_VD.double()
    gradients, losses = [], []
    for rows_C in rows_R.split(8):
        log_student_CV, log_teacher_CV = (
            F.log_softmax(states_BTD.flatten(0, 1)[rows_C].double() @ head_VD.T, dim=-1)
            for states_BTD in (inputs.student_BTD, inputs.teacher_BTD)
        )
        losses.append((log_teacher_CV.exp() * (log_teacher_CV - log_student_CV)).sum(-1))
        gradients.append((log_student_CV.exp() - log_teacher_CV.exp()) @ head_VD / len(rows_R))
    return float(torch.cat(losses).mean()), torch.cat(gradients)


def seconds(variant: Variant, inputs: Inputs) -> float:
    begun = time.process_time()
    run(variant, inputs)
    return time.process_time() - begun


def measure(variants: dict[str, Variant], inputs: Inputs, *, rounds: int, liger: Path | None) -> None:
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            taken[name].append(seconds(variant, inputs))
    least, median = ({name: float(choose(taken[name])) for name in variants} for choose in (np.min, np.median))
    memory = {name: memory_of(name, liger) for name in variants}
    say("\n| | smallest, s | median, s | of this project's smallest | of its median | memory, GB |")
    say("|---|---|---|---|---|---|")
    for name in variants:
        ratios = f"{least[name] / least[OURS]:.2f} | {median[name] / median[OURS]:.2f}"
        say(f"| {name} | {least[name]:.2f} | {median[name]:.2f} | {ratios} | {memory[name] / 1e9:.2f} |")
    say(f"\n{rounds} rounds in turn, one thread, load average {os.getloadavg()[0]:.1f}")
    for name, goal in SPEED_GOALS.items():
        if name in variants:
            ratio = median[name] / median[OURS]
            say(f"{name}: {ratio:.1f} times, to be {goal:.0f}: {'kept' if ratio >= goal else 'MISSED'}")
    ratio = memory[MODELOPT] / memory[OURS]
    verdict = "kept" if ratio >= MEMORY_GOAL else "MISSED"
    say(f"memory of {MODELOPT}: {ratio:.1f} times, to be {MEMORY_GOAL:.0f}: {verdict}")


def without_malloc() -> dict[str, str]:
    """The environment as it was before ``MALLOC``."""
    return {name: value for name, value in os.environ.items() if name not in MALLOC}


def memory_of(name: str, liger: Path | None) -> int:
    """Bytes, in a process of its own: allocated memory that is kept would hide what the next one needs."""
    words = ["--memory-of", name, *(["--liger", str(liger)] if liger else [])]
    ended = subprocess.run(
        program(*words), env=without_malloc() | RETURNING, capture_output=True, text=True, check=True
    )
    return int(ended.stdout.split()[-1])


def most_memory(work: Callable[[], Any]) -> int:
    """Bytes of resident memory that the process needs for this beyond what it has before.

    The process is one that was started with ``RETURNING``.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    before = _kilobytes("VmRSS")
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
