"""The distillation loss against float64 autograd on full logits, and how little memory it takes."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qad_dist.distill.loss import LossSums, distillation_loss, row_metrics

NUM_ROWS, VOCABULARY, WIDTH = 37, 53, 11


class Inputs(NamedTuple):
    """What the loss reads; float32."""

    student_RD: Tensor
    teacher_RD: Tensor
    head_VD: Tensor
    targets_R: Tensor
    kl_weight_R: Tensor
    ce_weight_R: Tensor


def make_inputs(*, rows: int = NUM_ROWS, vocabulary: int = VOCABULARY, width: int = WIDTH, seed: int = 0) -> Inputs:
    """Random states, targets that are not the teacher's favourites, weights of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    teacher_RD = torch.randn(rows, width, generator=generator)
    return Inputs(
        student_RD=teacher_RD + 0.5 * torch.randn(rows, width, generator=generator),
        teacher_RD=teacher_RD,
        head_VD=torch.randn(vocabulary, width, generator=generator),
        targets_R=torch.randint(vocabulary, (rows,), generator=generator),
        kl_weight_R=torch.rand(rows, generator=generator) * (torch.arange(rows) % 5 != 0),
        ce_weight_R=torch.rand(rows, generator=generator) * (torch.arange(rows) % 3 != 0),
    )


def run(inputs: Inputs, *, temperature: float = 1.0, chunk_rows: int = 8, **options: Any) -> tuple[LossSums, Tensor]:
    """The loss and its gradient with respect to the student's states."""
    student_RD = inputs.student_RD.clone().requires_grad_()
    sums = distillation_loss(
        student_RD,
        *inputs[1:4],
        kl_weight_R=inputs.kl_weight_R,
        ce_weight_R=inputs.ce_weight_R,
        temperature=temperature,
        chunk_rows=chunk_rows,
        **options,
    )
    sums.loss.backward()
    assert student_RD.grad is not None
    return sums, student_RD.grad


def reference(inputs: Inputs, *, temperature: float, head_VE: Tensor | None = None) -> tuple[dict[str, float], Tensor]:
    """The definition, in float64 with all logits at once; autograd makes the gradient."""
    student_RD = inputs.student_RD.double().requires_grad_()
    head_VD = inputs.head_VD.double()
    teacher_head_VE = head_VD if head_VE is None else head_VE.double()
    student_RV, teacher_RV = student_RD @ head_VD.T, inputs.teacher_RD.double() @ teacher_head_VE.T
    kl_R = temperature**2 * F.kl_div(
        F.log_softmax(student_RV / temperature, -1),
        F.log_softmax(teacher_RV / temperature, -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    ce_R = F.cross_entropy(student_RV, inputs.targets_R, reduction="none")
    loss = (inputs.kl_weight_R.double() * kl_R + inputs.ce_weight_R.double() * ce_R).sum()
    loss.backward()
    counted_R = (inputs.kl_weight_R > 0) | (inputs.ce_weight_R > 0)
    agrees_R = student_RV.argmax(-1) == teacher_RV.argmax(-1)
    sums = {
        "loss": float(loss.detach()),
        "kl": float(kl_R.detach()[counted_R].sum()),
        "ce": float(ce_R.detach()[counted_R].sum()),
        "agreements": float(agrees_R[counted_R].sum()),
    }
    assert student_RD.grad is not None
    return sums, student_RD.grad


# Both terms, each alone, and a weight of 0 in every place.
WEIGHTS = {"both": (1.0, 1.0), "KL alone": (1.0, 0.0), "cross-entropy alone": (0.0, 0.7)}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_value_and_gradient_are_those_of_the_definition(weights: tuple[float, float], temperature: float) -> None:
    inputs = make_inputs()
    inputs = inputs._replace(kl_weight_R=inputs.kl_weight_R * weights[0], ce_weight_R=inputs.ce_weight_R * weights[1])

    sums, gradient_RD = run(inputs, temperature=temperature)

    expected, expected_gradient_RD = reference(inputs, temperature=temperature)
    for name, value in expected.items():
        assert float(getattr(sums, name).detach()) == pytest.approx(value, rel=2e-6), name
    torch.testing.assert_close(gradient_RD.double(), expected_gradient_RD, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_student_that_gives_the_teachers_tokens_nothing_has_a_finite_loss(size: float, temperature: float) -> None:
    inputs = make_inputs()
    inputs = inputs._replace(student_RD=-size * inputs.teacher_RD, kl_weight_R=torch.ones(NUM_ROWS))

    sums, gradient_RD = run(inputs, temperature=temperature)

    expected, expected_gradient_RD = reference(inputs, temperature=temperature)
    for name, value in expected.items():
        assert float(getattr(sums, name).detach()) == pytest.approx(value, rel=1e-5), name
    torch.testing.assert_close(gradient_RD.double(), expected_gradient_RD, rtol=1e-4, atol=1e-4)


def test_near_students_have_the_kl_of_float64() -> None:
    """Where logits are large and differ by little, sums of exponentials do not tell them apart in float32."""
    rows = 200
    inputs = make_inputs(rows=rows)
    inputs = inputs._replace(
        teacher_RD=5 * inputs.teacher_RD,
        student_RD=5 * inputs.teacher_RD + 1e-3 * inputs.student_RD,
        kl_weight_R=torch.ones(rows),
        ce_weight_R=torch.zeros(rows),
    )

    sums, _ = run(inputs)

    expected, _ = reference(inputs, temperature=1.0)
    assert expected["kl"] < 1e-6 * rows
    assert float(sums.kl) == pytest.approx(expected["kl"], abs=1e-7 * rows)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, NUM_ROWS, 1000])
def test_chunks_do_not_change_the_result(chunk_rows: int, temperature: float) -> None:
    inputs = make_inputs()
    whole, whole_gradient_RD = run(inputs, temperature=temperature, chunk_rows=NUM_ROWS)

    sums, gradient_RD = run(inputs, temperature=temperature, chunk_rows=chunk_rows)

    for name in ("loss", "kl", "ce", "agreements"):
        torch.testing.assert_close(getattr(sums, name), getattr(whole, name), rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient_RD, whole_gradient_RD, rtol=1e-5, atol=5e-6)  # products of other shapes


def test_gradient_follows_the_factor_that_the_caller_applies() -> None:
    """The loop divides by the rows of the step and multiplies by the ranks."""
    inputs = make_inputs()
    _, gradient_RD = run(inputs)
    student_RD = inputs.student_RD.clone().requires_grad_()
    sums = distillation_loss(
        student_RD,
        *inputs[1:4],
        kl_weight_R=inputs.kl_weight_R,
        ce_weight_R=inputs.ce_weight_R,
        temperature=1.0,
        chunk_rows=8,
    )

    (sums.loss * 2 / 128).backward()

    torch.testing.assert_close(student_RD.grad, gradient_RD * 2 / 128)


def test_gradient_size_does_not_depend_on_the_temperature() -> None:
    """For logits that are small against T, T^2 KL is half the variance of the difference: without T at all."""
    inputs = make_inputs()
    inputs = inputs._replace(
        student_RD=inputs.student_RD * 0.02,
        teacher_RD=inputs.teacher_RD * 0.02,
        kl_weight_R=torch.ones(NUM_ROWS),
        ce_weight_R=torch.zeros(NUM_ROWS),
    )

    sums, gradients = zip(*(run(inputs, temperature=temperature) for temperature in (1.0, 2.0, 8.0)), strict=True)

    for other in (1, 2):
        assert sums[other].loss.item() == pytest.approx(sums[0].loss.item(), rel=0.1)
        ratio = gradients[other].norm() / gradients[0].norm()
        assert float(ratio) == pytest.approx(1.0, abs=0.05)


def test_rows_without_weight_contribute_nothing() -> None:
    inputs = make_inputs()
    kept = (inputs.kl_weight_R > 0) | (inputs.ce_weight_R > 0)
    assert 0 < int(kept.sum()) < NUM_ROWS
    changed = inputs.student_RD.clone()
    changed[~kept] = 1e3

    before, gradient_RD = run(inputs)
    after, _ = run(inputs._replace(student_RD=changed))
    alone, _ = run(Inputs(*(t if name == "head_VD" else t[kept] for name, t in inputs._asdict().items())))

    assert not gradient_RD[~kept].any()
    assert gradient_RD[kept].abs().amax(1).all()
    for name in ("loss", "kl", "ce", "agreements"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
        torch.testing.assert_close(getattr(before, name), getattr(alone, name))


def test_batch_that_only_keeps_the_ranks_together_has_loss_and_gradient_zero() -> None:
    inputs = make_inputs()
    zeros = torch.zeros(NUM_ROWS)

    sums, gradient_RD = run(inputs._replace(kl_weight_R=zeros, ce_weight_R=zeros))

    assert [value.item() for value in (sums.loss, sums.kl, sums.ce, sums.agreements)] == [0, 0, 0, 0]
    assert not gradient_RD.any()


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_that_equals_its_teacher_has_no_kl_and_no_gradient(temperature: float, divergence: str) -> None:
    inputs = make_inputs()
    inputs = inputs._replace(
        student_RD=inputs.teacher_RD, kl_weight_R=torch.ones(NUM_ROWS), ce_weight_R=torch.zeros(NUM_ROWS)
    )

    sums, gradient_RD = run(inputs, temperature=temperature, divergence=divergence)

    assert sums.loss.item() == sums.kl.item() == 0
    assert float(sums.agreements) == NUM_ROWS
    assert not gradient_RD.any()


def test_kl_is_not_symmetric_and_runs_from_teacher_to_student() -> None:
    """Teacher sure of token 0, student undecided: the KL is log 2; the other way round it is far larger."""
    head_VD = torch.eye(2)
    sure, undecided = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    weights = {"kl_weight_R": torch.ones(1), "ce_weight_R": torch.zeros(1), "temperature": 1.0, "chunk_rows": 1}
    target = torch.tensor([0])

    forward = distillation_loss(undecided, sure, head_VD, target, **weights)
    backward = distillation_loss(sure, undecided, head_VD, target, **weights)

    assert float(forward.kl) == pytest.approx(0.693147, abs=1e-5)
    assert float(backward.kl) == pytest.approx(20 - 0.693147, abs=1e-4)


def reverse_reference(inputs: Inputs, head_VE: Tensor, *, temperature: float) -> tuple[float, float, Tensor]:
    """KL(student to teacher) and the loss by the definition in float64, the teacher having this head."""
    student_RD = inputs.student_RD.double().requires_grad_()
    student_RV = student_RD @ inputs.head_VD.double().T
    log_student_RV = (student_RV / temperature).log_softmax(-1)
    log_teacher_RV = (inputs.teacher_RD.double() @ head_VE.double().T / temperature).log_softmax(-1)
    kl_R = temperature**2 * (log_student_RV.exp() * (log_student_RV - log_teacher_RV)).sum(-1)
    ce_R = F.cross_entropy(student_RV, inputs.targets_R, reduction="none")
    loss = (inputs.kl_weight_R.double() * kl_R + inputs.ce_weight_R.double() * ce_R).sum()
    loss.backward()
    counted_R = (inputs.kl_weight_R > 0) | (inputs.ce_weight_R > 0)
    assert student_RD.grad is not None
    return float(loss.detach()), float(kl_R.detach()[counted_R].sum()), student_RD.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_reverse_kl_and_its_gradient_are_those_of_the_definition(
    weights: tuple[float, float], temperature: float
) -> None:
    inputs = make_inputs()
    inputs = inputs._replace(kl_weight_R=inputs.kl_weight_R * weights[0], ce_weight_R=inputs.ce_weight_R * weights[1])

    sums, gradient_RD = run(inputs, temperature=temperature, divergence="reverse")

    loss, kl, expected_gradient_RD = reverse_reference(inputs, inputs.head_VD, temperature=temperature)
    assert float(sums.loss.detach()) == pytest.approx(loss, rel=2e-6)
    assert float(sums.kl) == pytest.approx(kl, rel=2e-6)
    torch.testing.assert_close(gradient_RD.double(), expected_gradient_RD, rtol=1e-5, atol=5e-6)
    others = reference(inputs, temperature=temperature)[0]
    assert float(sums.ce) == pytest.approx(others["ce"], rel=2e-6)
    assert float(sums.agreements) == others["agreements"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_with_a_head_of_another_width_is_read_through_it(temperature: float) -> None:
    inputs, random = make_inputs(), torch.Generator().manual_seed(3)
    head_VE = torch.randn(VOCABULARY, WIDTH + 6, generator=random)
    inputs = inputs._replace(teacher_RD=torch.randn(NUM_ROWS, WIDTH + 6, generator=random))

    for divergence in ("forward", "reverse"):
        sums, gradient_RD = run(inputs, temperature=temperature, divergence=divergence, teacher_head_VE=head_VE)

        if divergence == "reverse":
            loss, kl, expected_RD = reverse_reference(inputs, head_VE, temperature=temperature)
        else:
            found, expected_RD = reference(inputs, temperature=temperature, head_VE=head_VE)
            loss, kl = found["loss"], found["kl"]
        assert float(sums.loss.detach()) == pytest.approx(loss, rel=2e-6)
        assert float(sums.kl) == pytest.approx(kl, rel=2e-6)
        torch.testing.assert_close(gradient_RD.double(), expected_RD, rtol=1e-5, atol=1e-5)
    rows = row_metrics(*inputs[:4], chunk_rows=8, teacher_head_VE=head_VE)
    plain, _ = reference(inputs, temperature=1.0, head_VE=head_VE)
    counted_R = (inputs.kl_weight_R > 0) | (inputs.ce_weight_R > 0)
    assert float(rows.kl_R[counted_R].double().sum()) == pytest.approx(plain["kl"], rel=1e-5)
    assert float(rows.agrees_R[counted_R].sum()) == plain["agreements"]


def test_reverse_kl_is_the_forward_one_with_the_models_exchanged() -> None:
    inputs = make_inputs()
    exchanged = inputs._replace(student_RD=inputs.teacher_RD, teacher_RD=inputs.student_RD)

    backward, _ = run(inputs, divergence="reverse")

    forward, _ = run(exchanged)
    torch.testing.assert_close(backward.kl, forward.kl, rtol=2e-6, atol=0)
    assert float(backward.kl) != pytest.approx(float(run(inputs)[0].kl), rel=0.01)


def test_reverse_kl_lets_the_student_leave_out_what_the_teacher_finds_unlikely() -> None:
    """Teacher undecided, student sure of token 0: log 2 one way, far more the other; by hand."""
    head_VD = torch.eye(2)
    sure, undecided = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    weights = {"kl_weight_R": torch.ones(1), "ce_weight_R": torch.zeros(1), "temperature": 1.0, "chunk_rows": 1}
    target = torch.tensor([0])

    reverse = distillation_loss(sure, undecided, head_VD, target, **weights, divergence="reverse")
    forward = distillation_loss(sure, undecided, head_VD, target, **weights)

    assert float(reverse.kl) == pytest.approx(0.693147, abs=1e-5)
    assert float(forward.kl) == pytest.approx(20 - 0.693147, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_cross_entropy_without_weights_is_measured_as_one_of_weight_0(divergence: str, temperature: float) -> None:
    inputs = make_inputs()
    inputs = inputs._replace(ce_weight_R=torch.zeros(NUM_ROWS))
    expected, expected_gradient_RD = run(inputs, temperature=temperature, divergence=divergence)

    sums, gradient_RD = run(inputs._replace(ce_weight_R=None), temperature=temperature, divergence=divergence)

    for name in ("loss", "kl", "ce", "agreements"):
        assert torch.equal(getattr(sums, name), getattr(expected, name)), name
    assert torch.equal(gradient_RD, expected_gradient_RD)
    assert float(sums.ce) > 0


def test_nothing_but_the_student_gets_a_gradient() -> None:
    inputs = make_inputs()
    student_RD, teacher_RD, head_VD = (tensor.clone().requires_grad_() for tensor in inputs[:3])

    distillation_loss(
        student_RD,
        teacher_RD,
        head_VD,
        inputs.targets_R,
        kl_weight_R=inputs.kl_weight_R,
        ce_weight_R=inputs.ce_weight_R,
        temperature=1.0,
        chunk_rows=8,
    ).loss.backward()

    assert student_RD.grad is not None
    assert teacher_RD.grad is None
    assert head_VD.grad is None


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_of_bfloat16_states_only_the_gradient_is_rounded(scale: float) -> None:
    """Logits and all behind them are float32: of close models, logits in bfloat16 would make a KL of their own."""
    inputs = make_inputs(vocabulary=500)
    rounded = inputs._replace(
        student_RD=(scale * inputs.teacher_RD + 0.02 * inputs.student_RD).bfloat16(),
        teacher_RD=(scale * inputs.teacher_RD).bfloat16(),
        head_VD=inputs.head_VD.bfloat16(),
    )

    sums, gradient_RD = run(rounded)

    expected, expected_gradient_RD = reference(rounded, temperature=1.0)
    assert sums.loss.dtype == torch.float32
    assert gradient_RD.dtype == torch.bfloat16
    for name in ("loss", "kl", "ce"):
        # Few rows of near models: where a CPU makes logits of two bf16 products, 2**-17 of a large one shows.
        assert getattr(sums, name).item() == pytest.approx(expected[name], rel=1e-2)
    difference = (gradient_RD.double() - expected_gradient_RD).norm() / expected_gradient_RD.norm()
    assert float(difference) < 0.01


def test_gradient_of_bfloat16_states_is_scaled_by_the_exact_factor() -> None:
    inputs = make_inputs(rows=400, vocabulary=500)
    student_RD = inputs.student_RD.bfloat16().requires_grad_()
    arguments = {"kl_weight_R": inputs.kl_weight_R, "ce_weight_R": inputs.ce_weight_R, "temperature": 1.0}
    heads = inputs.teacher_RD.bfloat16(), inputs.head_VD.bfloat16(), inputs.targets_R
    factor = 8 / 5411  # lies between two bfloat16 numbers; their rounding is 0.09 % off

    gradients = []
    for scale in (1.0, factor):
        student_RD.grad = None
        (distillation_loss(student_RD, *heads, **arguments, chunk_rows=8).loss * scale).backward()
        gradients.append(student_RD.grad.double())

    # Each element is rounded once more, up or down; the rounding of the factor would have moved all one way.
    ratio = (gradients[1] * gradients[0]).sum() / (gradients[0] ** 2).sum()
    assert float(ratio) == pytest.approx(factor, rel=3e-4)


class LargestTensor(TorchDispatchMode):
    """Watches every operator, forward and backward, for the elements of its largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(temperature: float, divergence: str) -> None:
    inputs = make_inputs(rows=96, vocabulary=512, width=4)

    with LargestTensor() as largest:
        run(inputs, temperature=temperature, chunk_rows=8, divergence=divergence)

    assert largest.num_elements == 8 * 512  # all logits would be 96 x 512
    with LargestTensor() as whole:
        run(inputs, temperature=temperature, chunk_rows=96, divergence=divergence)
    assert whole.num_elements == 96 * 512  # the watch sees what it should


@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
def test_row_metrics_are_those_of_the_definition(chunk_rows: int) -> None:
    inputs = make_inputs()
    student_RV, teacher_RV = (states.double() @ inputs.head_VD.double().T for states in inputs[:2])

    rows = row_metrics(*inputs[:4], chunk_rows=chunk_rows)

    log_student_RV, log_teacher_RV = student_RV.log_softmax(-1), teacher_RV.log_softmax(-1)
    kl_R = (log_teacher_RV.exp() * (log_teacher_RV - log_student_RV)).sum(-1)
    ce_R = -log_student_RV[torch.arange(NUM_ROWS), inputs.targets_R]
    torch.testing.assert_close(rows.kl_R.double(), kl_R, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.ce_R.double(), ce_R, rtol=1e-5, atol=1e-6)
    assert torch.equal(rows.agrees_R, student_RV.argmax(-1) == teacher_RV.argmax(-1))
    assert 0 < int(rows.agrees_R.sum()) < NUM_ROWS
