"""Distillation loss on response rows, through a frozen LM head, without ever holding all logits.

``L = sum_r  w_kl[r] * T^2 * KL(teacher_r || student_r)  +  w_ce[r] * CE(target_r, student_r)``

with both distributions softened by T in the KL; ``reverse`` is KL(student_r || teacher_r) instead. The gradient with
respect to the student's logits z is, with p of the student and q of the teacher,

    forward   w_kl * T * (p_T - q_T)                            +  w_ce * (p_1 - onehot)
    reverse   w_kl * T * p_T * (log p_T - log q_T - KL_T)       +  w_ce * (p_1 - onehot)

The head is frozen, so the gradient with respect to the student's hidden states is all that backward needs. It is
computed chunk by chunk in the forward pass, while the chunk's probabilities exist, and no gradient of the head's
weight is formed: nothing of size [R, V] outlives a chunk.

Dimension key: R response rows, C rows of a chunk, V vocabulary, D width, E the teacher's width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qad_dist.head import FrozenHead

FAINT = 1e-20
"""Of a probability: float32 has no logarithms of much smaller ones."""


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the rows of one micro-batch; the caller divides by the step's rows over all ranks."""

    loss: Tensor
    """Differentiable scalar, weights applied; float32."""
    kl: Tensor
    """Scalar: KL in nats at temperature 1 x T^2, unweighted, over rows of positive weight; float32, detached."""
    ce: Tensor
    """Scalar: cross-entropy in nats, likewise."""
    agreements: Tensor
    """Scalar: rows on which both models prefer the same token, likewise."""


@dataclass(frozen=True, slots=True)
class RowMetrics:
    """How near the student is to the teacher, row by row."""

    kl_R: Tensor
    """KL(teacher to student) in nats, float32."""
    ce_R: Tensor
    """Cross-entropy of the targets in nats, float32."""
    agrees_R: Tensor
    """bool: both prefer the same token."""


def distillation_loss(
    student_RD: Tensor,
    teacher_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    *,
    kl_weight_R: Tensor,
    ce_weight_R: Tensor | None,
    temperature: float,
    chunk_rows: int,
    divergence: str = "forward",
    teacher_head_VE: Tensor | None = None,
) -> LossSums:
    """Sum of the weighted KL and cross-entropy over response rows.

    Args:
        student_RD: Hidden states behind the final norm; the only input that gets a gradient.
        teacher_RD: The teacher's at the same rows, of its own width E if it has a head of its own.
        head_VD: The frozen LM head that both share.
        targets_R: int64, the teacher's tokens.
        kl_weight_R: float32, lambda included; 0 leaves a row out of the KL.
        ce_weight_R: float32, lambda included; None where the cross-entropy is measured and not learned from.
        temperature: Divides both logits in the KL, > 0. The factor T^2 keeps the gradient's size.
        chunk_rows: Rows whose logits exist at once.
        divergence: ``forward`` or ``reverse``.
        teacher_head_VE: The teacher's LM head, where it is another one.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    assert divergence in ("forward", "reverse"), divergence
    teacher_head = None if teacher_head_VE is None else teacher_head_VE.detach()
    loss, kl, ce, agreements = _ChunkedDistillation.apply(
        *(student_RD, teacher_RD.detach(), head_VD.detach(), teacher_head, targets_R),
        *(kl_weight_R, ce_weight_R, temperature, chunk_rows, divergence == "reverse"),
    )
    return LossSums(loss, kl, ce, agreements)


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_RD: Tensor,
        teacher_RD: Tensor,
        head_VD: Tensor,
        teacher_head_VE: Tensor | None,
        targets_R: Tensor,
        kl_weight_R: Tensor,
        ce_weight_R: Tensor | None,
        temperature: float,
        chunk_rows: int,
        is_reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = torch.zeros(4, dtype=torch.float32, device=student_RD.device)
        gradient_RD = torch.empty_like(student_RD)
        has_ce = ce_weight_R is not None
        ce_weight_R = torch.zeros_like(kl_weight_R) if ce_weight_R is None else ce_weight_R
        counts_R = ((kl_weight_R > 0) | (ce_weight_R > 0)).float()
        head = FrozenHead(head_VD)
        teacher_head = None if teacher_head_VE is None else FrozenHead(teacher_head_VE)
        for start in range(0, len(targets_R), chunk_rows):
            rows = slice(start, start + chunk_rows)
            # In place where it can be: of a vocabulary of 151,936, each of these takes 0.6 GB at 1,024 rows.
            teacher_CV, shift_CV = head.compare(student_RD[rows], teacher_RD[rows], teacher_head=teacher_head)
            kl_C, ce_C, agrees_C, gradient_CV, plain_CV = _divergence(
                teacher_CV, shift_CV, targets_R[rows], temperature=temperature, is_reverse=is_reverse, has_ce=has_ce
            )
            del teacher_CV, shift_CV
            kl_C = kl_C * temperature**2
            kl_weight_C, ce_weight_C, count_C = kl_weight_R[rows], ce_weight_R[rows], counts_R[rows]
            sums += torch.stack(
                [
                    (kl_weight_C * kl_C + ce_weight_C * ce_C).sum(),
                    (count_C * kl_C).sum(),
                    (count_C * ce_C).sum(),
                    (count_C * agrees_C).sum(),
                ]
            )
            gradient_CV.mul_((kl_weight_C * temperature)[:, None])
            if plain_CV is not None:
                gradient_CV += plain_CV.mul_(ce_weight_C[:, None])
                gradient_CV.scatter_add_(1, targets_R[rows, None], -ce_weight_C[:, None])
            del plain_CV
            gradient_RD[rows] = gradient_CV.to(head_VD.dtype) @ head_VD
        ctx.save_for_backward(gradient_RD)
        loss, kl, ce, agreements = sums.unbind()
        ctx.mark_non_differentiable(kl, ce, agreements)
        return loss, kl, ce, agreements

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_RD,) = ctx.saved_tensors
        # The factor stays float32: rounded to bf16 it would scale every gradient of a step by up to 0.4 %.
        return gradient_RD * gradients[0], *([None] * 10)


def _divergence(
    teacher_CV: Tensor, shift_CV: Tensor, targets_C: Tensor, *, temperature: float, is_reverse: bool, has_ce: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What there is to know of a chunk.

    Args:
        teacher_CV: Logits; used up.
        shift_CV: The student's logits less these; used up.
        targets_C: As in :func:`distillation_loss`, and so are the others.

    Returns:
        KL of softened distributions, cross-entropy and agreement of each row; the KL's gradient by the softened logits;
        and the student's probabilities, where the cross-entropy has a gradient.
    """
    best_C1 = teacher_CV.argmax(-1, keepdim=True)
    student_CV = teacher_CV + shift_CV
    highest_C1 = student_CV.amax(-1, keepdim=True)
    agrees_C = (student_CV.gather(1, best_C1) >= highest_C1).squeeze(1).float()
    target_C1 = student_CV.gather(1, targets_C[:, None])
    plain_CV = student_CV if temperature == 1 else student_CV.clone()
    total_C1 = _total(highest_C1, _softmax_(plain_CV))
    ce_C = (total_C1 - target_C1).squeeze(1)
    if temperature != 1:
        for values in (teacher_CV, shift_CV, student_CV, highest_C1):
            values.div_(temperature)
        total_C1 = _total(highest_C1, _softmax_(student_CV))
    elif has_ce:
        plain_CV = student_CV.clone()
    above_best_C1 = total_C1 - teacher_CV.gather(1, best_C1)
    gap_C1 = _gap(_softmax_(teacher_CV), student_CV, shift_CV, best_C1, above_best_C1)
    kl_C, gradient_CV = (_reverse if is_reverse else _forward)(teacher_CV, student_CV, shift_CV, gap_C1)
    return kl_C, ce_C, agrees_C, gradient_CV, plain_CV if has_ce else None


def _forward(teacher_CV: Tensor, student_CV: Tensor, shift_CV: Tensor, gap_C1: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher to student) of each row, and its gradient by the student's softened logits.

    Args:
        teacher_CV: Probabilities.
        student_CV: Probabilities; becomes the gradient.
        shift_CV: The student's logits less the teacher's; is used up.
        gap_C1: The logarithms of their sums of exponentials, likewise.
    """
    kl_C = gap_C1.squeeze(1) - shift_CV.mul_(teacher_CV).sum(-1)
    return kl_C, student_CV.sub_(teacher_CV)


def _reverse(teacher_CV: Tensor, student_CV: Tensor, shift_CV: Tensor, gap_C1: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student to teacher), likewise."""
    kl_C = torch.linalg.vecdot(student_CV, shift_CV) - gap_C1.squeeze(1)
    return kl_C, shift_CV.sub_(gap_C1 + kl_C[:, None]).mul_(student_CV)


def _gap(teacher_CV: Tensor, student_CV: Tensor, shift_CV: Tensor, best_C1: Tensor, above_best_C1: Tensor) -> Tensor:
    """The logarithm of the student's sum of exponentials less the teacher's.

    At any token it is what the logits differ by, less what the logarithms of the probabilities do. At the teacher's
    best these are exact to 1e-7, where the sums themselves, of logits of 20 and more, are to 2e-6. These serve where
    the student gives that token nothing: ``above_best_C1`` is its sum's logarithm less the teacher's logit there.
    """
    student_C1 = student_CV.gather(1, best_C1)
    log_teacher_C1, log_student_C1 = teacher_CV.gather(1, best_C1).log_(), student_C1.log()
    by_sums_C1 = above_best_C1 + log_teacher_C1
    return torch.where(student_C1 < FAINT, by_sums_C1, shift_CV.gather(1, best_C1) + log_teacher_C1 - log_student_C1)


def _softmax_(logits_CV: Tensor) -> Tensor:
    """In place: on a CPU, new memory takes three times as long as the softmax itself."""
    return torch.softmax(logits_CV, dim=-1, out=logits_CV)


def _total(highest_C1: Tensor, probabilities_CV: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials, from the highest logit and its probability."""
    return highest_C1 - probabilities_CV.amax(-1, keepdim=True).log_()


@torch.no_grad()
def row_metrics(
    student_RD: Tensor,
    teacher_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    *,
    chunk_rows: int,
    teacher_head_VE: Tensor | None = None,
) -> RowMetrics:
    """KL, cross-entropy and agreement of each response row at temperature 1, for evaluation."""
    kl, ce, agrees = [], [], []
    head = FrozenHead(head_VD)
    teacher_head = head if teacher_head_VE is None else FrozenHead(teacher_head_VE)
    for start in range(0, len(targets_R), chunk_rows):
        rows = slice(start, start + chunk_rows)
        student_CV, teacher_CV = head(student_RD[rows]), teacher_head(teacher_RD[rows])
        agrees.append(student_CV.argmax(-1) == teacher_CV.argmax(-1))
        log_student_CV, log_teacher_CV = F.log_softmax(student_CV, dim=-1), F.log_softmax(teacher_CV, dim=-1)
        kl.append((log_teacher_CV.exp() * (log_teacher_CV - log_student_CV)).sum(-1))
        ce.append(-log_student_CV.gather(1, targets_R[rows, None]).squeeze(1))
    return RowMetrics(torch.cat(kl), torch.cat(ce), torch.cat(agrees))
