"""Segment attention against a loop of plain softmax attention, and against transformers' own."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qad_dist.asr.attention import Segments, segment_attention
from qad_dist.asr.load import AsrModel

LENGTHS = [5, 1, 17, 9]
"""Of all three groups: 17 and 9, 5 with 1."""
SCALING = 0.3


def random_states(
    *, heads: int, kv_heads: int, positions: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one packed row, each ``[1, H, T, 8]``."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, count, positions, 8, generator=generator, dtype=dtype) for count in (heads, kv_heads, kv_heads)
    )


def plain_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], *, causal: bool) -> Tensor:
    """The definition: for each segment and head, softmax of scaled scores times values; ``[1, T, H, E]``."""
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        for head in range(query.shape[1]):
            scores = query[0, head, part] @ key[0, head // group, part].T * SCALING
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            output[0, head, part] = scores.softmax(-1) @ value[0, head // group, part]
        start += length
    return output.transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_segment_attention_is_plain_attention_within_each_segment(heads: int, kv_heads: int, causal: bool) -> None:
    states = random_states(heads=heads, kv_heads=kv_heads, positions=sum(LENGTHS))
    segments = Segments.from_lengths(torch.tensor(LENGTHS), causal=causal, device=torch.device("cpu"))

    output, weights = segment_attention(torch.nn.Identity(), *states, None, scaling=SCALING, segments=segments)

    assert weights is None
    expected = plain_attention(*states, LENGTHS, causal=causal)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        (LENGTHS, [(2, 17), (2, 5), (2, 2)]),
        ([8], [(2, 8), (2, 2), (2, 2)]),
        ([100, 50, 51, 26, 25, 3, 2], [(2, 100), (2, 50), (3, 25)]),
        ([100, 30, 20, 7], [(2, 100), (2, 2), (2, 20)]),  # 30 joins 100, and nothing is left between them
        ([1, 1, 1], [(3, 2), (2, 2), (2, 2)]),
    ],
)
def test_segments_are_padded_to_the_longest_of_their_like(lengths: list[int], shapes: list[tuple[int, int]]) -> None:
    segments = Segments.from_lengths(torch.tensor(lengths), causal=True, device=torch.device("cpu"))

    assert [tuple(group.gather_GL.shape) for group in segments.groups] == shapes
    cells = torch.cat([group.gather_GL.flatten() for group in segments.groups])
    assert cells[segments.scatter_T].tolist() == list(range(sum(lengths)))


def test_gradients_stay_within_their_segment() -> None:
    """Keys of one segment get no gradient from the output of another, in both directions."""
    query, key, value = random_states(heads=2, kv_heads=2, positions=sum(LENGTHS))
    key.requires_grad_()
    value.requires_grad_()
    segments = Segments.from_lengths(torch.tensor(LENGTHS), causal=True, device=torch.device("cpu"))

    output, _ = segment_attention(torch.nn.Identity(), query, key, value, None, scaling=SCALING, segments=segments)
    output[:, 6:23].square().sum().backward()  # the segment of 17

    for gradient in (key.grad, value.grad):
        touched = gradient.abs().amax((0, 1, 3)) > 0
        assert touched.tolist() == [False] * 6 + [True] * 17 + [False] * 9


def test_without_segments_it_is_transformers_sdpa() -> None:
    query, key, value = random_states(heads=4, kv_heads=2, positions=11, dtype=torch.float32)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask = torch.ones(1, 1, 11, 11).tril().bool()
    mask[..., :3] = False
    mask[..., :3, 0] = True

    for attention_mask in (None, mask):
        output, _ = segment_attention(module, query, key, value, attention_mask, scaling=SCALING)  # type: ignore[arg-type]
        expected, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=SCALING)  # type: ignore[arg-type]
        assert torch.equal(output, expected)


@torch.no_grad()
def test_decoder_uses_the_padding_mask_of_a_batch(nano: AsrModel) -> None:
    """A custom attention name silently loses transformers' mask unless a mask function is registered with it."""
    generator = torch.Generator().manual_seed(1)
    short, long = (torch.randn(1, n, 128, generator=generator) for n in (6, 10))
    garbage = 50 * torch.randn(1, 4, 128, generator=generator)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])

    padded = nano.decoder(
        inputs_embeds=torch.cat([torch.cat([garbage, short], 1), long]),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).last_hidden_state

    for row, states in ((padded[0, 4:], short), (padded[1], long)):
        alone = nano.decoder(inputs_embeds=states).last_hidden_state[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=2e-5)
