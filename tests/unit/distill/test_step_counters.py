"""What one micro-batch costs, counted: audio tower runs, waits for the device, logits, operations, graphs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qad_dist.asr.attention import Segments
from qad_dist.asr.audio_tower import window_lengths
from qad_dist.asr.decoder import DecoderStack, compile_layers
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.flops import ModelShape, Work, step_flops
from qad_dist.distill.loop import forward
from qad_dist.distill.loss import distillation_loss
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import choose_trainable
from qad_dist.distill.window import Window
from qad_dist.pairing import join_models, share_frozen_parts
from qad_dist.quant.fake_quant import use_fast_fake_quant
from tests.helpers.quantized import copied, pack_with_own_responses, quantize
from tests.helpers.qwen import Samples

CHUNK_ROWS = 8


@dataclass(frozen=True, slots=True)
class Pair:
    """A teacher, and its student as training has it."""

    teacher: AsrModel
    student: AsrModel
    models: TeacherAndStudent

    def run(self, batch: Batch) -> Tensor:
        """Forward and backward of one micro-batch; returns the loss."""
        embedded = self.models.embed(batch)
        with torch.no_grad():
            teacher_RD = self.models.teacher_states(batch, embedded).rows_RD
        sums = distillation_loss(
            self.models.student_states(embedded).rows_RD,
            teacher_RD,
            self.models.head_VD,
            batch.targets_R,
            kl_weight_R=batch.kl_weight_R,
            ce_weight_R=batch.ce_weight_R,
            temperature=1.0,
            chunk_rows=CHUNK_ROWS,
            teacher_head_VE=self.models.teacher_head_VE,
        )
        sums.loss.backward()
        return sums.loss.detach()


def join(teacher: AsrModel, student: AsrModel) -> Pair:
    share_frozen_parts(teacher, student)
    use_fast_fake_quant(student.model)
    stack = DecoderStack(student.decoder.layers)
    choose_trainable(stack, train_norms=False)
    return Pair(teacher, student, join_models(teacher, student, stack))


@pytest.fixture(scope="module")
def batches(nano: AsrModel, clips: "list[Samples]") -> list[Batch]:
    """Of 4, 7, 1, 2 and 1 utterances."""
    parts = (clips[:4], clips[4:11], clips[11:12], clips[12:14], clips[14:15])
    return [pack_with_own_responses(nano, part) for part in parts]


@pytest.fixture(scope="module")
def quantized(nano: AsrModel, batches: list[Batch]) -> AsrModel:
    """Shared: nobody may change it."""
    return quantize(copied(nano), batches[0], alpha=1.0)


@pytest.fixture
def pair(nano: AsrModel, quantized: AsrModel) -> Pair:
    return join(copied(nano), copied(quantized))


class Watch(TorchDispatchMode):
    """The results of every operator, forward and backward."""

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._look(leaf)
        return result


def test_audio_tower_runs_once_for_both_models(pair: Pair, batches: list[Batch]) -> None:
    towers = {id(model.audio_tower): model.audio_tower for model in (pair.teacher, pair.student)}
    calls: list[int] = []
    for tower in towers.values():
        tower.proj2.register_forward_hook(lambda *_: calls.append(1))

    pair.run(batches[0])

    assert len(calls) == 1


@pytest.fixture
def meta(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where both models are then: a value, a shape that depends on one, and a copy to the host are errors there."""
    device = torch.device("meta")
    # The rotary embedding switches autocast off, which the meta device does not have.
    monkeypatch.setattr(torch, "autocast", _without_autocast)
    for model in (pair.teacher, pair.student):
        model.model.to(device)
    return device


def test_step_never_asks_the_device_for_a_value(pair: Pair, batches: list[Batch], meta: torch.device) -> None:
    models = join_models(pair.teacher, pair.student, DecoderStack(pair.student.decoder.layers))
    on_meta = replace(pair, models=models)

    loss = on_meta.run(batches[0].to(meta))

    assert loss.device == meta
    assert_weights_have_gradients(pair.student, meta)


def test_forward_of_the_loop_never_asks_the_device_for_a_value_either(
    pair: Pair, batches: list[Batch], meta: torch.device
) -> None:
    """From a batch on the host, with the hidden states of all layers compared."""
    settings = TrainConfig(hidden_weight=0.5)
    stack = DecoderStack(pair.student.decoder.layers, keeps_all=True)
    models = join_models(pair.teacher, pair.student, stack, compares_layers=True)
    window = Window(meta, settings)

    loss = forward(models, batches[0], settings, step=0, rows=60, tokens=400, window=window)
    loss.backward()

    assert_weights_have_gradients(pair.student, meta)


def assert_weights_have_gradients(student: AsrModel, meta: torch.device) -> None:
    weights = [weight for weight in student.decoder.layers.parameters() if weight.requires_grad]
    assert len(weights) == 21
    assert all(weight.grad is not None and weight.grad.device == meta for weight in weights)


def _without_autocast(*, device_type: str, enabled: bool) -> Any:
    assert (device_type, enabled) == ("meta", False)
    return nullcontext()


def test_logits_exist_for_the_rows_of_one_chunk_only(pair: Pair, batches: list[Batch]) -> None:
    vocabulary = len(pair.models.head_VD)
    rows: list[int] = []

    def look(tensor: Tensor) -> None:
        if tensor.ndim == 2 and tensor.shape[1] == vocabulary:
            rows.append(tensor.shape[0])

    with Watch(look):
        pair.run(batches[1])

    width = pair.models.head_VD.shape[1]
    assert batches[1].num_rows > 2 * CHUNK_ROWS
    assert max(set(rows) - {width}) == CHUNK_ROWS  # the head itself, transposed, has a row for each of the width


def work_as_laid_out(batch: Batch) -> Work:
    """With the padding that is computed: pairs of attention, each chunk of audio to 100 frames."""
    windows_S = window_lengths(batch.mel_lengths_U, window_frames=800)
    return Work(
        tokens=batch.num_tokens,
        pairs=pairs_as_laid_out(batch.cu_seqlens_U1.diff().long(), causal=True),
        rows=batch.num_rows,
        audio_seconds=sum(-(-frames // 100) for frames in batch.mel_lengths_U.tolist()),
        audio_tokens=len(batch.audio_positions_P),
        audio_pairs=pairs_as_laid_out(windows_S, causal=False),
    )


def pairs_as_laid_out(lengths_S: Tensor, *, causal: bool) -> int:
    segments = Segments.from_lengths(lengths_S, causal=causal, device=torch.device("cpu"))
    return sum(group.mask_G1LL.numel() for group in segments.groups)


@pytest.mark.parametrize("number", [0, 1])
def test_step_computes_what_the_formula_says_and_nothing_else(pair: Pair, batches: list[Batch], number: int) -> None:
    config = pair.teacher.model.config.thinker_config
    shape = ModelShape.from_configs(config.text_config, config.audio_config)
    work = work_as_laid_out(batches[number])

    # Of the other kernels nothing is counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pair.run(batches[number])

    # Nobody needs the gradient of the first layer's input, through q, k and v. What is above it: rotary angles, and the
    # projection of the convolutions' padding.
    saved = 2 * shape.width * (shape.attention_width + 2 * shape.key_value_width) * work.tokens
    assert counter.get_total_flops() == pytest.approx(step_flops(shape, work) - saved, rel=0.002)


def test_step_without_a_teacher_leaves_out_its_pass() -> None:
    shape = ModelShape(
        width=1024, num_layers=28, attention_width=2048, key_value_width=1024, feed_forward=3072, vocabulary=151_936,
        tower_width=896, tower_layers=18, tower_feed_forward=3584, tower_channels=480, num_mel_bins=128,
    )  # fmt: skip
    # 10 s of speech with 37 response tokens, by hand: tower 90 GFLOP, decoder 164, head 11.5.
    work = Work(tokens=182, pairs=182**2 // 2, rows=37, audio_seconds=10, audio_tokens=130, audio_pairs=130 * 104)

    assert step_flops(shape, work) / 1e9 == pytest.approx(781, abs=0.5)
    assert step_flops(shape, work, teacher_runs=False) / 1e9 == pytest.approx(781 - 164, abs=0.5)


def test_three_graphs_serve_batches_of_all_sizes(
    pair: Pair, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the teacher, one of the student's first layer, whose input needs no gradient, and one of its others."""
    counter = CompileCounter()
    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", _compile_with(counter))
    eager = join(copied(pair.teacher), copied(pair.student))
    compile_layers(pair.teacher.decoder.layers, pair.student.decoder.layers)
    sizes = {(batch.num_tokens, batch.num_utterances) for batch in batches}

    graphs = []
    for batch in batches:
        torch.testing.assert_close(pair.run(batch), eager.run(batch), rtol=1e-4, atol=0)
        graphs.append(counter.frame_count)

    assert len(sizes) == len(batches)
    assert graphs == [3] * len(batches)
    assert not torch._dynamo.utils.counters["graph_break"]


def _compile_with(backend: Any) -> Callable[..., None]:
    compiled = nn.Module.compile

    def compile(self: nn.Module, **kwargs: Any) -> None:
        compiled(self, backend=backend, **kwargs)

    return compile
