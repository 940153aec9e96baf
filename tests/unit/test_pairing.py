"""Teacher and student side by side: what both share exists once, a teacher may be stored, or of another size."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qad_dist.asr.dataset import LabelledSet
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.labeller import TorchLabeller
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config.label import LabelConfig
from qad_dist.config.train import TrainConfig
from qad_dist.distill.evaluate import evaluate
from qad_dist.distill.loop import forward
from qad_dist.distill.models import States, TeacherAndStudent
from qad_dist.distill.optim import choose_trainable
from qad_dist.distill.window import Window
from qad_dist.pairing import check_same_vocabulary, join_models, share_frozen_parts
from shards.audio import encode_flac
from shards.errors import ModelError
from shards.index import read_index, read_utterances
from shards.labelled import read_labelled
from shards.labels import LabelHeader, label_path, write_labels
from shards.read import Shards
from shards.stored_states import StoredStates
from shards.verdicts import ALL, Verdict
from shards.workers import Reader
from tests.helpers.quantized import copied
from tests.helpers.qwen import Samples, load, write_random_model
from tests.helpers.reading import write_shards

CPU = torch.device("cpu")
NUM_CLIPS = 5
LOSS = TrainConfig(ce_weight=0.3)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models, and the student's layers as the engine would have them."""

    teacher: AsrModel
    student: AsrModel
    stack: DecoderStack

    def join(self, *, is_cached: bool = False, compares_layers: bool = False) -> TeacherAndStudent:
        self.stack.keeps_all = compares_layers
        return join_models(self.teacher, self.student, self.stack, is_cached=is_cached, compares_layers=compares_layers)


def pair_of(teacher: AsrModel, *, dtype: str = "float32") -> Pair:
    """The student is the embedded teacher, its decoder a fifth noise: far enough away to be taught."""
    student, random = load(dtype=dtype), torch.Generator().manual_seed(0)
    for parameter in student.decoder.layers.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter += (0.2 * parameter.float().std() * noise).to(parameter.dtype)
    stack = DecoderStack(student.decoder.layers)
    choose_trainable(stack, train_norms=False)
    return Pair(teacher, student, stack)


@pytest.fixture
def pair(nano: AsrModel) -> Pair:
    pair = pair_of(copied(nano))
    share_frozen_parts(pair.teacher, pair.student)
    return pair


def learn(pair: Pair, *batches: Batch, is_cached: bool = False, settings: TrainConfig = LOSS) -> tuple[float, Tensor]:
    """Loss and gradient, summed over rows, of these micro-batches."""
    window, total = Window(CPU, settings), 0.0
    pair.stack.zero_grad()
    models = pair.join(is_cached=is_cached, compares_layers=settings.compares_layers)
    for batch in batches:
        loss = forward(models, batch, settings, step=0, rows=1, tokens=1, window=window)
        loss.backward()
        total += float(loss.detach())
    gradients = [weight.grad for weight in pair.stack.parameters() if weight.grad is not None]
    return total, torch.cat([gradient.float().flatten() for gradient in gradients])


def cosine(found: Tensor, expected: Tensor) -> float:
    return float(F.cosine_similarity(found.double(), expected.double(), dim=0))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@dataclass(frozen=True, slots=True)
class Digits:
    """Spoken digits as their teacher has labelled them."""

    online: LabelledSet
    cached: LabelledSet
    """The same, with the hidden states that the labels were chosen from."""


def label_digits(teacher: AsrModel, clips: list[Samples], folder: Path, dtype: str) -> Iterator[Digits]:
    seconds = {f"clip-{i}": len(clip) / 16_000 for i, clip in enumerate(clips)}
    flacs = {f"clip-{i}.flac": encode_flac(clip) for i, clip in enumerate(clips)}
    write_shards(folder / "pack", {"train-000000.tar": flacs}, seconds=seconds)
    (entry,) = read_index(folder / "pack").shards
    settings = LabelConfig(hidden_states=True, batch_audio_seconds=5, slots=4)
    with Reader(Shards(folder / "pack")) as reader:
        utterances = list(read_utterances(folder / "pack"))
        longest = max(utterance.duration_seconds for utterance in utterances)
        labeller = TorchLabeller(teacher, reader, settings, longest_seconds=longest)
        found = labeller.label(utterances, [None] * len(utterances), on_step=lambda: None)
        header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={"dtype": dtype})
        write_labels(label_path(folder / "label", entry.name), header, found.labels, states_TD=found.hidden_TD)
        rows = read_labelled(
            folder / "pack",
            folder / "label",
            split="train",
            verdicts=lambda file: [Verdict(use=ALL)] * len(file.labels),
        ).rows
        parts: dict[str, Any] = {"reader": reader, "prompt": teacher.prompt, "extractor": teacher.extractor}
        stored = StoredStates(folder / "pack", folder / "label")
        yield Digits(LabelledSet(rows, **parts), LabelledSet(rows, **parts, stored=stored))


@pytest.fixture(scope="module")
def digits(nano: AsrModel, clips: list[Samples], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Digits]:
    yield from label_digits(nano, clips[:NUM_CLIPS], tmp_path_factory.mktemp("labelled"), "float32")


def test_student_keeps_its_layers_and_takes_the_teachers_frozen_parts(load_nano: Callable[..., AsrModel]) -> None:
    teacher, student = load_nano(), load_nano()
    layers = student.decoder.layers

    share_frozen_parts(teacher, student)

    assert student.decoder.layers is layers
    assert student.decoder.layers is not teacher.decoder.layers
    shared = {parameter.data_ptr() for parameter in teacher.model.parameters()}
    own = {name for name, parameter in student.model.named_parameters() if parameter.data_ptr() not in shared}
    assert own == {f"thinker.model.layers.{name}" for name, _ in layers.named_parameters()}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("audio tower", "thinker.audio_tower.layers.3.fc1.bias"),
        ("embeddings", "thinker.model.embed_tokens.weight"),
        ("final norm", "thinker.model.norm.weight"),
    ],
)
def test_student_with_another_frozen_part_is_refused(load_nano: Callable[..., AsrModel], part: str, name: str) -> None:
    teacher, student = load_nano(), load_nano()
    with torch.no_grad():
        dict(student.model.named_parameters())[name].view(-1)[-1] += 1e-3

    with pytest.raises(ModelError, match=f"must share their {part}, got other values of .*; run quantize again"):
        share_frozen_parts(teacher, student)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_packed_utterances_have_the_loss_and_gradient_of_one_by_one(
    pair: Pair, digits: Digits, hidden_weight: float
) -> None:
    """The decoder does not see across utterances, nor does anything else."""
    settings = TrainConfig(ce_weight=0.3, hidden_weight=hidden_weight)
    whole_loss, whole = learn(pair, digits.online.batch(range(NUM_CLIPS)), settings=settings)

    one_by_one = (digits.online.batch([index]) for index in range(NUM_CLIPS))
    loss, gradient = learn(pair, *one_by_one, settings=settings)

    # float32: products of other shapes are summed in another order.
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert relative_error(gradient, whole) <= 1e-5
    # Any leak is far larger: the same utterances in one sequence differ by
    one = replace(digits.online.batch(range(NUM_CLIPS)), cu_seqlens_U1=torch.tensor([0, whole_tokens(digits)]))
    assert relative_error(learn(pair, one, settings=settings)[1], whole) > 0.01


def test_distance_of_hidden_states_is_added_to_the_loss_over_all_layers_and_readable_tokens(
    pair: Pair, digits: Digits
) -> None:
    """By its definition; the second utterance has no weight."""
    batch = digits.online.batch(range(NUM_CLIPS))
    owners_R = torch.searchsorted(batch.cu_seqlens_U1[1:].long(), batch.rows_R, right=True)
    batch = replace(batch, kl_weight_R=(owners_R != 1).float(), ce_weight_R=torch.zeros(len(owners_R)))
    begin, end = batch.cu_seqlens_U1[1:3].tolist()

    both, _ = learn(pair, batch, settings=TrainConfig(hidden_weight=0.5))

    alone, _ = learn(pair, batch, settings=TrainConfig())
    models = pair.join(compares_layers=True)
    with torch.no_grad():
        embedded = models.embed(batch)
        student, teacher = models.student_states(embedded).layers, models.teacher_states(batch, embedded).layers
    assert len(student) == len(teacher) == len(pair.stack.layers)
    relative_N = torch.stack(
        [(s - t).double().square().sum(1) / t.double().square().sum(1) for s, t in zip(student, teacher, strict=True)]
    ).mean(0)
    expected = float(relative_N.sum() - relative_N[begin:end].sum())
    assert both - alone == pytest.approx(0.5 * expected, rel=1e-4)
    assert 0.5 * expected > 0.1 * alone


def whole_tokens(digits: Digits) -> int:
    return int(digits.online.num_tokens.sum())


def test_audio_of_one_utterance_is_nothing_to_the_rows_of_the_others(pair: Pair, digits: Digits) -> None:
    batch = digits.online.batch(range(NUM_CLIPS))
    frames = batch.mel_lengths_U.tolist()
    mels = list(batch.mel_MF.split(frames, dim=1))
    mels[2] = mels[2].flip(1)
    changed = replace(batch, mel_MF=torch.cat(mels, dim=1))
    owners_R = torch.searchsorted(batch.cu_seqlens_U1[1:].long(), batch.rows_R, right=True)

    for states in (student_rows, teacher_rows):
        before_RD, after_RD = states(pair, batch), states(pair, changed)

        assert torch.equal(before_RD[owners_R != 2], after_RD[owners_R != 2])
        assert (before_RD != after_RD).any(1)[owners_R == 2].all()


@torch.no_grad()
def student_rows(pair: Pair, batch: Batch) -> Tensor:
    models = pair.join()
    return models.student_states(models.embed(batch)).rows_RD


@torch.no_grad()
def teacher_rows(pair: Pair, batch: Batch) -> Tensor:
    models = pair.join()
    return models.teacher_states(batch, models.embed(batch)).rows_RD


class Disturbed(torch.nn.Module):
    """A student whose states behind the last layer are others wherever the loss has no row."""

    def __init__(self, stack: DecoderStack, rows_R: Tensor, *, size: float) -> None:
        super().__init__()
        self.stack, self.rows_R, self.size = stack, rows_R, size
        self.seen_ND = torch.zeros(0)

    def forward(self, *args: Any) -> tuple[Tensor]:
        (self.seen_ND,) = self.stack(*args)
        self.seen_ND.retain_grad()
        noise_ND = self.size * torch.randn(self.seen_ND.shape, generator=torch.Generator().manual_seed(1))
        return (self.seen_ND + noise_ND.index_fill(0, self.rows_R, 0.0),)


def test_states_at_the_prompt_and_behind_the_end_are_nothing_to_the_loss(pair: Pair, digits: Digits) -> None:
    batch = digits.online.batch(range(NUM_CLIPS))
    losses = []

    for size in (0.0, 100.0):
        disturbed = Disturbed(pair.stack, batch.rows_R, size=size)
        models = join_models(pair.teacher, pair.student, disturbed)
        window = Window(CPU, LOSS)
        loss = forward(models, batch, LOSS, step=0, rows=1, tokens=1, window=window)
        loss.backward()
        losses.append(float(loss.detach()))

    assert losses[0] == losses[1]
    assert disturbed.seen_ND.grad is not None
    has_gradient_N = disturbed.seen_ND.grad.abs().amax(1) > 0
    assert torch.equal(has_gradient_N.nonzero().squeeze(1), batch.rows_R)
    assert batch.num_rows < batch.num_tokens / 2


def test_stored_states_are_those_that_the_teacher_has_in_training_but_for_their_rounding(
    pair: Pair, digits: Digits
) -> None:
    order = [3, 0, 4, 1, 2]
    batch = digits.cached.batch(order)
    assert batch.teacher_RD is not None

    found_RD, expected_RD = batch.teacher_RD, teacher_rows(pair, batch)

    assert found_RD.dtype == torch.bfloat16
    assert found_RD.shape == expected_RD.shape
    # Half a unit in the last place of 8 bits, and where float32 lay at a border of two of them, a whole one.
    torch.testing.assert_close(found_RD.float(), expected_RD, rtol=2**-8, atol=1e-5)
    assert torch.equal(batch.targets_R, digits.online.batch(order).targets_R)


def test_stored_teacher_teaches_what_one_beside_the_student_does(pair: Pair, digits: Digits) -> None:
    online_loss, online = learn(pair, digits.online.batch([0, 1, 2]), digits.online.batch([3, 4]))

    pair.teacher.decoder.layers = torch.nn.ModuleList()  # as the stage leaves it: nothing may ask for them
    loss, gradient = learn(pair, digits.cached.batch([0, 1, 2]), digits.cached.batch([3, 4]), is_cached=True)

    assert loss == pytest.approx(online_loss, rel=1e-3)
    assert loss != online_loss  # it is the rounded one
    assert cosine(gradient, online) > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_states_that_were_computed_alike_teach_the_same_to_the_bit(digits: Digits, dtype: str) -> None:
    """In bfloat16 the teacher's own states; in float32 those states rounded, in the definition of the loss, too."""
    pair = pair_of(load(dtype=dtype), dtype=dtype)
    share_frozen_parts(pair.teacher, pair.student)
    batch = digits.online.batch(range(NUM_CLIPS))
    states_RD = teacher_rows(pair, batch).bfloat16()
    stored = replace(batch, teacher_RD=states_RD)
    online = replace(
        pair.join(), teacher_states=lambda *_: States(states_RD.to(pair.teacher.head_weight_VD.dtype))
    ) if dtype == "float32" else pair.join()  # fmt: skip

    found = evaluate(pair.join(is_cached=True), [(0, stored)], chunk_rows=16)
    expected = evaluate(online, [(0, batch)], chunk_rows=16)

    assert found == expected
    assert found.kl_per_token > 0.01
    if dtype == "bfloat16":
        losses, gradients = zip(learn(pair, stored, is_cached=True), learn(pair, batch), strict=True)
        assert losses[0] == losses[1]
        assert torch.equal(*gradients)


def test_batch_without_stored_states_is_our_mistake(pair: Pair, digits: Digits) -> None:
    with pytest.raises(AssertionError, match="no states of the teacher"):
        learn(pair, digits.online.batch([0]), is_cached=True)


LARGER = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 320}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> AsrModel:
    """A teacher of another width, depth and audio tower, with the same tokens; of random weights."""
    folder = write_random_model(tmp_path_factory.mktemp("larger") / "model", seed=5, **LARGER)
    return load(folder)


@pytest.mark.parametrize(("divergence", "temperature"), [("forward", 1.0), ("reverse", 2.0)])
def test_teacher_of_another_size_teaches_by_its_own_audio_tower_and_head(
    larger: AsrModel, digits: Digits, divergence: str, temperature: float
) -> None:
    """Against both models by themselves, all logits at once, and autograd in float64."""
    pair = pair_of(larger)
    check_same_vocabulary(pair.teacher, pair.student)
    settings = TrainConfig.model_validate({"divergence": divergence, "temperature": temperature})
    batch = digits.online.batch(range(NUM_CLIPS))

    loss, gradient = learn(pair, batch, settings=settings)

    pair.stack.zero_grad()
    student_RV = logits_of(pair.student, pair.stack, batch) / temperature
    with torch.no_grad():
        teacher_RV = logits_of(larger, DecoderStack(larger.decoder.layers), batch) / temperature
    student, teacher = student_RV.log_softmax(1), teacher_RV.log_softmax(1)
    first, second = (teacher, student) if divergence == "forward" else (student, teacher)
    expected = temperature**2 * (first.exp() * (first - second)).sum()
    expected.backward()
    reference = torch.cat([weight.grad.flatten() for weight in pair.stack.parameters() if weight.grad is not None])
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert loss / batch.num_rows > 0.1
    assert relative_error(gradient, reference) <= 1e-5


def logits_of(model: AsrModel, stack: DecoderStack, batch: Batch) -> Tensor:
    states_RD = response_states(stack, embed(model, batch), model.decoder.norm)
    return states_RD.double() @ model.head_weight_VD.double().T


def test_teacher_of_another_size_is_left_as_it_is(larger: AsrModel, digits: Digits) -> None:
    pair = pair_of(larger)
    before = {name: weight.clone() for name, weight in larger.model.state_dict().items()}

    learn(pair, digits.online.batch([0, 1]))

    assert all(torch.equal(weight, before[name]) for name, weight in larger.model.state_dict().items())
    assert not any(weight.grad is not None for weight in larger.model.parameters())
    frozen = [name for name, weight in pair.student.model.named_parameters() if weight.grad is None]
    assert all("_proj.weight" not in name or "audio_tower" in name for name in frozen)


def change_size(folder: Path) -> None:
    """Of the vocabulary: a teacher with more tokens, as another family has."""
    write_random_model(folder, vocab_size=1088)


def swap_tokens(folder: Path) -> None:
    write_random_model(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def change_features(folder: Path) -> None:
    """Fewer mel bins, as Whisper's first models have them."""
    write_random_model(folder, audio={"num_mel_bins": 80})
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "feature_size": 80}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_size, r"the size of the vocabulary of model\.path, got 1088 for 1024 in "),
        (swap_tokens, r"the vocabulary of model\.path, got another one in "),
        (change_features, r"the audio features of model\.path, got another one in "),
    ],
    ids=["size", "tokens", "features"],
)
def test_teacher_that_speaks_of_other_things_is_refused_by_name(nano: AsrModel, tmp_path: Path, change, told) -> None:
    change(tmp_path / "other")

    with pytest.raises(
        ModelError, match=rf"^train\.teacher_model must have {told}.*/other; name a teacher of the same"
    ):
        check_same_vocabulary(load(tmp_path / "other"), nano)
