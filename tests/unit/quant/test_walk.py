"""The calibration set layer by layer: what is remembered, and where the hidden states stand."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.pairing import walk_batch
from qad_dist.quant.fold import fold_groups
from qad_dist.quant.walk import Tokens, Walk, WalkBatch, final_hidden
from tests.helpers.quantized import copied

WIDTHS = {"qkv": 128, "o": 128, "gate_up": 128, "down": 384}
READERS = {"qkv": "self_attn.k_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}


def walking(nano: AsrModel, batches: Sequence[Batch], *, searched: Sequence[int] = (2,)) -> list[WalkBatch]:
    return [walk_batch(nano, b, number=i, is_search=i in searched) for i, b in enumerate(batches)]


def walk_of(batches: Sequence[WalkBatch], *, num_rows: int = 8192, is_corrected: bool = True) -> Walk:
    return Walk(batches, num_rows=num_rows, is_corrected=is_corrected)


@torch.no_grad()
def inputs_of(model: AsrModel, batch: WalkBatch, number: int, hidden_ND: Tensor | None = None) -> dict[str, Tensor]:
    """What each group of a layer reads of a whole batch, by hooks on Linears that the walk does not look at."""
    layer, found = model.decoder.layers[number], {}
    hooks = [
        layer.get_submodule(reader).register_forward_pre_hook(
            lambda _, arguments, name=name: found.update({name: arguments[0].squeeze(0)})
        )
        for name, reader in READERS.items()
    ]
    if hidden_ND is None:
        hidden_ND = final_hidden(batch, model.decoder.layers[:number])
    batch.run_layer(layer, hidden_ND)
    for hook in hooks:
        hook.remove()
    return found


def assert_equal(found: Tokens, expected: Tokens) -> None:
    assert torch.equal(found.inputs_SC, expected.inputs_SC)
    assert torch.equal(found.weights_S, expected.weights_S)


def test_all_tokens_are_remembered_where_there_is_room_in_the_order_of_the_batches(
    nano: AsrModel, batches: list[Batch]
) -> None:
    own, layer = walking(nano, batches), nano.decoder.layers[0]

    _, tokens = walk_of(own).pass_layer(layer, fold_groups(layer))

    whole = [inputs_of(nano, batch, 0) for batch in own]
    assert list(tokens) == list(WIDTHS)
    for name, width in WIDTHS.items():
        assert torch.equal(tokens[name][False].inputs_SC, torch.cat([whole[0][name], whole[1][name]]))
        assert torch.equal(tokens[name][True].inputs_SC, whole[2][name])
        assert tokens[name][True].inputs_SC.shape == (len(batches[2].input_ids_N), width)


def test_tokens_before_response_tokens_weigh_eleven_times(nano: AsrModel, batches: list[Batch]) -> None:
    own, layer = walking(nano, batches), nano.decoder.layers[0]

    _, tokens = walk_of(own).pass_layer(layer, fold_groups(layer))

    expected_S = torch.ones(len(batches[2].input_ids_N))
    for row in batches[2].rows_R.tolist():
        expected_S[row] = 11
    assert torch.equal(tokens["down"][True].weights_S, expected_S)
    assert len(tokens["down"][False].weights_S) == sum(len(batch.input_ids_N) for batch in batches[:2])


@pytest.mark.parametrize("num_rows", [3, 50, 211])
def test_sampled_tokens_are_those_that_batch_and_position_say(
    nano: AsrModel, batches: list[Batch], num_rows: int
) -> None:
    """Of each part as large a share of every batch, from its first to its last token at equal distances."""
    own, layer = walking(nano, batches), nano.decoder.layers[1]
    for batch in own:
        batch.hidden_ND = final_hidden(batch, nano.decoder.layers[:1])

    _, tokens = walk_of(own, num_rows=num_rows).pass_layer(layer, fold_groups(layer))

    lengths = [len(batch.input_ids_N) for batch in batches]
    for part, members in ((False, [0, 1]), (True, [2])):
        share = min(1.0, num_rows / sum(lengths[i] for i in members))
        chosen, weights = [], []
        for i in members:
            count = max(1, round(lengths[i] * share))
            places = [round(place * (lengths[i] - 1) / max(1, count - 1)) for place in range(count)]
            chosen.append(inputs_of(nano, own[i], 1)["gate_up"][places])
            weights += [11.0 if place in batches[i].rows_R.tolist() else 1.0 for place in places]
        assert torch.equal(tokens["gate_up"][part].inputs_SC, torch.cat(chosen))
        assert tokens["gate_up"][part].weights_S.tolist() == weights


def test_maxima_are_of_all_tokens_of_both_parts_and_of_the_rest_alone(nano: AsrModel, batches: list[Batch]) -> None:
    """Whatever is sampled, and whether weights are corrected or not."""
    own, layer = walking(nano, batches), nano.decoder.layers[0]

    amax, _ = walk_of(own, num_rows=3, is_corrected=False).pass_layer(layer, fold_groups(layer))

    whole = [inputs_of(nano, batch, 0) for batch in own]
    for name in WIDTHS:
        assert torch.equal(amax[name].of_all_C, torch.cat([inputs[name] for inputs in whole]).abs().amax(0))
        assert torch.equal(amax[name].of_rest_C, torch.cat([inputs[name] for inputs in whole[:2]]).abs().amax(0))
        assert not torch.equal(amax[name].of_rest_C, amax[name].of_all_C)


def test_maxima_of_the_rest_are_those_of_all_where_there_is_no_rest(nano: AsrModel, batches: list[Batch]) -> None:
    layer = nano.decoder.layers[0]

    amax, _ = walk_of(walking(nano, batches[:1], searched=(0,))).pass_layer(layer, fold_groups(layer))

    assert all(torch.equal(maxima.of_rest_C, maxima.of_all_C) for maxima in amax.values())


def test_order_of_a_ranks_batches_and_repeated_ones_change_nothing(nano: AsrModel, batches: list[Batch]) -> None:
    """A rank for which no batch is left repeats another's."""
    own, layer = walking(nano, batches, searched=(0, 2)), nano.decoder.layers[0]
    groups = fold_groups(layer)
    amax, tokens = walk_of(own, num_rows=100).pass_layer(layer, groups)

    again = [walking(nano, batches, searched=(0, 2))[number] for number in (2, 0, 1, 0)]
    other_amax, other = walk_of(again, num_rows=100).pass_layer(layer, groups)

    for name in WIDTHS:
        assert torch.equal(other_amax[name].of_all_C, amax[name].of_all_C)
        assert torch.equal(other_amax[name].of_rest_C, amax[name].of_rest_C)
        for part in (True, False):
            assert_equal(other[name][part], tokens[name][part])


def test_rest_is_remembered_only_where_weights_are_corrected(nano: AsrModel, batches: list[Batch]) -> None:
    layer = nano.decoder.layers[0]

    _, tokens = walk_of(walking(nano, batches), is_corrected=False).pass_layer(layer, fold_groups(layer))
    _, alone = walk_of(walking(nano, batches[:1], searched=(0,))).pass_layer(layer, fold_groups(layer))

    assert {name: list(parts) for name, parts in tokens.items()} == {name: [True] for name in WIDTHS}
    assert {name: list(parts) for name, parts in alone.items()} == {name: [True] for name in WIDTHS}


def test_batches_stand_before_the_next_layer_and_go_back_to_the_start(nano: AsrModel, batches: list[Batch]) -> None:
    walk = walk_of(walking(nano, batches))
    for number, layer in enumerate(nano.decoder.layers):
        walk.pass_layer(layer, fold_groups(layer))
        for batch in walk.batches:
            assert torch.equal(batch.hidden_ND, final_hidden(batch, nano.decoder.layers[: number + 1]))
            assert batch.drifted_ND is batch.start_ND

    ((batch, states_ND),) = walk.final_states(nano.decoder.layers)
    walk.to_start()

    assert batch.number == 2
    assert torch.equal(states_ND, final_hidden(walk.batches[2], nano.decoder.layers))
    assert all(batch.hidden_ND is batch.start_ND for batch in walk.batches)


def test_drifted_states_are_looked_at_where_they_stand(nano: AsrModel, batches: list[Batch]) -> None:
    """They pass other layers than the teacher's; looking does not move them."""
    moved = copied(nano)
    for parameter in moved.decoder.layers[0].parameters():
        parameter.data *= 1.1
    own = walking(nano, batches)
    walk = walk_of(own)
    walk.pass_layer(nano.decoder.layers[0], fold_groups(nano.decoder.layers[0]))
    walk.pass_drifted(moved.decoder.layers[0])
    groups = fold_groups(moved.decoder.layers[1])

    first = walk.look_at_drifted(moved.decoder.layers[1], groups[3])
    second = walk.look_at_drifted(moved.decoder.layers[1], groups[3])

    expected = inputs_of(moved, own[2], 1)["down"]
    assert torch.equal(first[True].inputs_SC, expected)
    assert_equal(second[True], first[True])
    assert_equal(second[False], first[False])
    assert torch.equal(own[2].drifted_ND, final_hidden(own[2], moved.decoder.layers[:1]))
    assert torch.equal(own[2].hidden_ND, final_hidden(own[2], nano.decoder.layers[:1]))
    assert not torch.equal(own[2].hidden_ND, own[2].drifted_ND)


def test_no_hook_is_left_behind(nano: AsrModel, batches: list[Batch]) -> None:
    layer = copied(nano).decoder.layers[0]

    walk = walk_of(walking(nano, batches))
    walk.pass_layer(layer, fold_groups(layer))
    walk.look_at_drifted(layer, fold_groups(layer)[0])

    assert not any(module._forward_pre_hooks for module in layer.modules())
