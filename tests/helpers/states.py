"""Batches, models and an engine for distillation without speech: hidden states are looked up by token id."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qad_dist.batch import Batch
from qad_dist.distill.models import States, TeacherAndStudent


def make_batch(ids: Sequence[int], targets: Sequence[int], *, key: str = "u") -> Batch:
    """One utterance whose every position is a response row."""
    count = len(ids)
    return Batch(
        keys=(key,),
        input_ids_N=torch.tensor(ids),
        position_ids_N=torch.arange(count),
        cu_seqlens_U1=torch.tensor([0, count], dtype=torch.int32),
        audio_positions_P=torch.zeros(0, dtype=torch.int64),
        mel_MF=torch.zeros(1, 1),
        mel_lengths_U=torch.tensor([1]),
        rows_R=torch.arange(count),
        targets_R=torch.tensor(targets),
        kl_weight_R=torch.ones(count),
        ce_weight_R=torch.ones(count),
        weighted_rows=count,
    )


def pack(*batches: Batch) -> Batch:
    """The utterances of several such batches in one."""
    counts = [batch.num_tokens for batch in batches]
    whole = make_batch(
        *(torch.cat([getattr(b, name) for b in batches]).tolist() for name in ("input_ids_N", "targets_R"))
    )
    return replace(
        whole,
        keys=tuple(key for batch in batches for key in batch.keys),
        position_ids_N=torch.cat([batch.position_ids_N for batch in batches]),
        cu_seqlens_U1=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        mel_MF=torch.zeros(1, len(batches)),
        mel_lengths_U=torch.ones(len(batches), dtype=torch.int64),
        kl_weight_R=torch.cat([batch.kl_weight_R for batch in batches]),
        ce_weight_R=torch.cat([batch.ce_weight_R for batch in batches]),
        weighted_rows=sum(batch.weighted_rows for batch in batches),
    )


def make_models(teacher_VD: Tensor, student_VD: Tensor, head_VD: Tensor) -> TeacherAndStudent:
    """Models whose hidden state at a position is a row of a table."""
    return TeacherAndStudent(
        embed=lambda batch: batch.input_ids_N[batch.rows_R],
        teacher_states=lambda _, ids_R: States(teacher_VD[ids_R]),
        student_states=lambda ids_R: States(student_VD[ids_R]),
        head_VD=head_VD,
        device=torch.device("cpu"),
    )


class PlainEngine:
    """What the loop asks of an engine, on this rank alone and without any library: gradient descent with momentum."""

    def __init__(self, **weights: nn.Parameter) -> None:
        """Train these, by name."""
        self.weights = weights
        self.moments = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.calls: list[str] = []
        self.learning_rates: list[float] = []
        self.updates = 0
        self._skipped, self._norm = 0, 0.0

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()
        self.calls.append("last" if is_last else "backward")

    def step(self, *, learning_rate: float, is_finite: Tensor) -> None:
        self.calls.append("step")
        self.learning_rates.append(learning_rate)
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        self._norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        if bool(is_finite) and self._norm < torch.inf:
            self.updates += 1
            for name, gradient in gradients.items():
                self.moments[name].mul_(0.5).add_(gradient)
                self.weights[name].data -= learning_rate * self.moments[name]
        else:
            self._skipped += 1
        for weight in self.weights.values():
            weight.grad = None

    def num_skipped(self) -> int:
        return self._skipped

    def gradient_norm(self) -> float:
        return self._norm

    def trained_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, weight in self.weights.items():
            moment = self.moments[name].clone()
            yield name, {"weight": weight.detach().clone(), "exp_avg": moment, "exp_avg_sq": torch.zeros_like(moment)}

    def load_trained_state(self, read: Callable[[str], dict[str, Tensor]], *, updates: int) -> None:
        for name, weight in self.weights.items():
            state = read(name)
            weight.data.copy_(state["weight"])
            self.moments[name].copy_(state["exp_avg"])
        self.updates = updates

    def held_tensors(self) -> dict[str, list[Tensor]]:
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        weights = [weight.detach() for weight in self.weights.values()]
        return {"weights": weights, "gradients": gradients, "masters": [], "moments": [*self.moments.values()]}
