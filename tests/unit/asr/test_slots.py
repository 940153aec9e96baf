"""One step of the slots: that nothing waits, grows or moves in it, and that what is left in a slot does not matter."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import AsrModel
from qad_dist.asr.slots import RUNNING, Slots
from qad_dist.batch import Batch
from tests.helpers.operators import WAITING, count_operators, record_shapes
from tests.helpers.quantized import quantize
from tests.helpers.qwen import Samples, mels_of

LENGTH = 160
STEPS = 6


def prompts_of(model: AsrModel, clips: Sequence[Samples]) -> Batch:
    examples = [Example(key="", mel_MF=mel_MF, response_ids=()) for mel_MF in mels_of(model, clips)]
    return collate(examples, prompt=model.prompt)


@torch.no_grad()
def started(
    model: AsrModel, clips: Sequence[Samples], *, places: Sequence[int] | None = None, num_slots: int | None = None
) -> tuple[Slots, list[int]]:
    """Slots in which these clips have begun, and the lengths of their prompts."""
    batch = prompts_of(model, clips)
    lengths = batch.cu_seqlens_U1.diff().tolist()
    slots = Slots(model, num_slots=num_slots or len(clips), max_length=LENGTH, keep_hidden=True)
    slots.start(places or range(len(clips)), batch, [LENGTH - 1] * len(clips))
    return slots, lengths


@torch.no_grad()
def take_steps(slots: Slots, number: int, *, num_slots: int, length: int = LENGTH) -> None:
    for _ in range(number):
        slots.step(num_slots, length)


def responses_in(slots: Slots, places: Sequence[int], lengths: Sequence[int], number: int) -> list[list[int]]:
    """The first tokens that were chosen in these slots."""
    spans = [range(length, length + number) for length in lengths]
    return [response.token_ids for response in slots.responses(places, spans)]


def storages(slots: Slots) -> dict[str, int]:
    """Where each tensor of the slots lies."""
    return {name: value.data_ptr() for name, value in vars(slots).items() if isinstance(value, Tensor)}


@torch.no_grad()
def test_step_never_waits_for_the_device(nano: AsrModel, clips: list[Samples]) -> None:
    slots, _ = started(nano, clips[:4])

    with count_operators() as operators:
        slots.step(4, LENGTH)

    assert operators.total() > 100
    assert {name: operators[name] for name in WAITING} == dict.fromkeys(WAITING, 0)


@torch.no_grad()
def test_look_at_what_has_ended_waits_and_is_counted(nano: AsrModel, clips: list[Samples]) -> None:
    """So that the count above can be trusted."""
    slots, _ = started(nano, clips[:4])

    with count_operators() as operators:
        assert int(slots._positions_S.max()) > 0
        assert slots._is_running_S.nonzero().shape == (4, 1)

    assert [operators["_local_scalar_dense"], operators["nonzero"]] == [1, 1]


@torch.no_grad()
def test_number_of_operators_does_not_depend_on_the_number_of_slots(nano: AsrModel, clips: list[Samples]) -> None:
    counts = []
    for number in (2, 16):
        slots, _ = started(nano, clips[:number])
        for length in (LENGTH, LENGTH - 32):
            with count_operators() as operators:
                slots.step(number, length)
            counts.append(operators)

    assert counts[0] == counts[1] == counts[2] == counts[3]


@torch.no_grad()
def test_memory_stays_where_it_is_from_step_to_step(nano: AsrModel, clips: list[Samples]) -> None:
    slots = Slots(nano, num_slots=6, max_length=LENGTH, keep_hidden=True)
    before = storages(slots)

    slots.start([4, 1], prompts_of(nano, clips[:2]), [LENGTH - 1] * 2)
    take_steps(slots, 3, num_slots=6)
    slots.start([0, 2, 3], prompts_of(nano, clips[2:5]), [LENGTH - 1] * 3)
    take_steps(slots, 3, num_slots=6, length=LENGTH - 16)

    assert storages(slots) == before
    assert len(before) >= 10


@torch.no_grad()
def test_shapes_of_a_step_do_not_depend_on_how_far_utterances_have_come(nano: AsrModel, clips: list[Samples]) -> None:
    """What a graph needs: the same operators on the same shapes, whatever the slots hold."""
    slots, _ = started(nano, clips[:4])
    with record_shapes() as first:
        slots.step(4, LENGTH)
    take_steps(slots, 20, num_slots=4)
    with record_shapes() as later:
        slots.step(4, LENGTH)

    assert first == later
    assert len(first) > 100


@torch.no_grad()
def test_steps_choose_what_a_pass_over_prompt_and_response_finds_likeliest(
    nano: AsrModel, clips: list[Samples]
) -> None:
    slots, lengths = started(nano, clips[:5])
    take_steps(slots, STEPS, num_slots=5)

    (*found,) = slots.responses(range(5), [range(length, length + 4) for length in lengths])

    for clip, response in zip(clips, found, strict=False):
        (mel_MF,) = mels_of(nano, [clip])
        batch = collate([Example(key="", mel_MF=mel_MF, response_ids=response.token_ids)], prompt=nano.prompt)
        hidden_RD = response_states(DecoderStack(nano.decoder.layers), embed(nano, batch), nano.decoder.norm)
        torch.testing.assert_close(response.hidden_RD, hidden_RD, rtol=0, atol=5e-5)  # states reach 20
        assert (hidden_RD @ nano.head_weight_VD.T).argmax(-1).tolist() == response.token_ids


@torch.no_grad()
def test_quantized_student_decodes_as_its_packed_pass_says(
    load_nano: Callable[..., AsrModel], clips: list[Samples]
) -> None:
    model = load_nano()
    (mel_MF,) = mels_of(model, clips[9:10])
    seen = collate([Example(key="", mel_MF=mel_MF, response_ids=[5, 6, 7])], prompt=model.prompt)
    quantize(model, seen)
    slots, lengths = started(model, clips[:5])

    take_steps(slots, STEPS, num_slots=5)

    for clip, response in zip(clips, slots.responses(range(5), [range(n, n + 4) for n in lengths]), strict=False):
        (mel_MF,) = mels_of(model, [clip])
        batch = collate([Example(key="", mel_MF=mel_MF, response_ids=response.token_ids)], prompt=model.prompt)
        hidden_RD = response_states(DecoderStack(model.decoder.layers), embed(model, batch), model.decoder.norm)
        logprobs_RV = (hidden_RD @ model.head_weight_VD.T).log_softmax(-1)
        chosen_R = logprobs_RV.gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
        # A value on the border of two codes may round either way: that is one step of INT8 in one place.
        torch.testing.assert_close(torch.tensor(response.logprobs), chosen_R, rtol=0, atol=0.05)


@torch.no_grad()
def test_places_and_earlier_contents_of_slots_do_not_matter(nano: AsrModel, clips: list[Samples]) -> None:
    slots, lengths = started(nano, clips[:3])
    take_steps(slots, STEPS, num_slots=3)
    expected = responses_in(slots, range(3), lengths, STEPS)

    used = Slots(nano, num_slots=9, max_length=LENGTH, keep_hidden=False)
    for states in (used._keys, used._values):
        states.normal_(0, 1e4, generator=torch.Generator().manual_seed(0))
    used._tokens_C.fill_(7)
    used._positions_S.fill_(LENGTH)
    used.start([7, 0, 4], prompts_of(nano, clips[:3]), [LENGTH - 1] * 3)
    take_steps(used, STEPS, num_slots=8)

    assert responses_in(used, [7, 0, 4], lengths, STEPS) == expected


@torch.no_grad()
def test_slot_whose_utterance_has_ended_stands_still_while_others_go_on(nano: AsrModel, clips: list[Samples]) -> None:
    batch = prompts_of(nano, clips[:3])
    lengths = batch.cu_seqlens_U1.diff().tolist()
    slots = Slots(nano, num_slots=3, max_length=LENGTH, keep_hidden=True)
    slots.start(range(3), batch, [lengths[0], lengths[1] + 2, LENGTH - 1])
    assert slots.last_positions(3) == [lengths[0], RUNNING, RUNNING]  # cut at its first token

    take_steps(slots, 2, num_slots=3)
    spans = [range(lengths[0], lengths[0] + 1), range(lengths[1], lengths[1] + 3)]
    before = slots.responses([0, 1], spans)
    take_steps(slots, 40, num_slots=3)
    after = slots.responses([0, 1], spans)

    assert slots.last_positions(3)[:2] == [lengths[0], lengths[1] + 2]
    for one, other in zip(before, after, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
        assert torch.equal(one.hidden_RD, other.hidden_RD)  # type: ignore[arg-type]
    last = slots.last_positions(3)[2]
    (whole,) = slots.responses([2], [range(lengths[2], last + 1)])
    assert whole.token_ids.index(nano.prompt.end_id) == last - lengths[2]  # it ended by its end token, and there


@torch.no_grad()
def test_moved_utterances_go_on_as_if_nothing_had_happened(nano: AsrModel, clips: list[Samples]) -> None:
    slots, lengths = started(nano, clips[:6])
    take_steps(slots, 2, num_slots=6)
    others, _ = started(nano, clips[:6])
    take_steps(others, STEPS, num_slots=6)
    expected = others.responses([4, 5], [range(n, n + STEPS) for n in lengths[4:]])

    slots.move([4, 5], [1, 0], max(lengths[4:]) + 3)
    take_steps(slots, STEPS - 2, num_slots=2)

    found = slots.responses([1, 0], [range(n, n + STEPS) for n in lengths[4:]])
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.hidden_RD, other.hidden_RD, rtol=0, atol=5e-5)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert slots.last_positions(2) == [others.last_positions(6)[5], others.last_positions(6)[4]]


@torch.no_grad()
def test_hidden_states_are_the_callers_own(nano: AsrModel, clips: list[Samples]) -> None:
    """The next utterance of a slot does not write over them."""
    slots, lengths = started(nano, clips[:1])
    (response,) = slots.responses([0], [range(lengths[0], lengths[0] + 1)])
    kept = response.hidden_RD.clone()  # type: ignore[union-attr]

    slots.start([0], prompts_of(nano, clips[3:4]), [LENGTH - 1])
    slots._hidden_CD.zero_()

    assert torch.equal(response.hidden_RD, kept)  # type: ignore[arg-type]
    assert kept.abs().max() > 1
