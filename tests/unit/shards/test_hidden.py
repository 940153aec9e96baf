"""Hidden states on disk: the same bits come back, by row, and no other file is taken for them."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.errors import NonFiniteError, ShardError
from shards.hidden import HiddenFile, HiddenStates, check_hidden, hidden_path, write_hidden
from shards.storage import sha256_file

NUM_TOKENS, WIDTH = 50, 24


@pytest.fixture
def states_TD() -> np.ndarray:
    """Every bit pattern of a finite bfloat16 may be among them."""
    bits = np.random.default_rng(5).integers(0, 2**16, (NUM_TOKENS, WIDTH), np.uint16)
    return np.where((bits & 0x7F80) == 0x7F80, bits & 0xBFFF, bits)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return hidden_path(tmp_path / "train-000001.jsonl")


def test_hidden_states_lie_beside_the_label_file():
    assert hidden_path(Path("a/train-000001.jsonl")) == Path("a/train-000001.hidden.safetensors")
    assert hidden_path(Path("a/train-000001.second.jsonl")) == Path("a/train-000001.second.hidden.safetensors")


def test_the_rows_of_an_utterance_come_back_bit_for_bit(path, states_TD):
    hidden = write_hidden(path, states_TD)

    states = HiddenStates(path, hidden, num_tokens=NUM_TOKENS)
    for start, num_tokens in [(0, 7), (7, 0), (7, 1), (30, 20), (50, 0), (0, 50)]:
        rows = states.rows(start, num_tokens)
        assert rows.dtype == np.uint16 and rows.shape == (num_tokens, WIDTH)
        assert rows.tobytes() == states_TD[start : start + num_tokens].tobytes()
    with pytest.raises(AssertionError):
        states.rows(45, 6)


def test_the_file_is_what_safetensors_reads_and_writes(path, states_TD):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    tensor_TD = torch.from_numpy(states_TD.view(np.int16)).view(torch.bfloat16)

    write_hidden(path, states_TD)

    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["hidden"]
        found_TD = file.get_tensor("hidden")
    assert found_TD.dtype == torch.bfloat16
    assert torch.equal(found_TD.view(torch.int16), tensor_TD.view(torch.int16))
    assert parts_of(path.read_bytes()) == parts_of(save({"hidden": tensor_TD}))


def parts_of(data: bytes) -> tuple[object, bytes, int]:
    """Header, tensors, and where these begin in units of 8 bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:], end % 8


def test_equal_states_give_equal_bytes_however_they_lie_in_memory(path, states_TD, tmp_path):
    one = write_hidden(path, states_TD)
    other = write_hidden(tmp_path / "other", np.asfortranarray(states_TD))

    assert one == other == HiddenFile(sha256=sha256_file(path), width=WIDTH)
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_a_shard_without_tokens_has_a_file(path):
    hidden = write_hidden(path, np.zeros((0, WIDTH), np.uint16))

    check_hidden(path, hidden, num_tokens=0, is_whole=True)
    assert HiddenStates(path, hidden, num_tokens=0).rows(0, 0).shape == (0, WIDTH)


def test_only_what_is_asked_for_is_read(path):
    """Of a file of 32 MiB, what one utterance needs comes into memory; the system may add up to 2 MiB around it."""
    hidden = write_hidden(path, np.ones((16_384, 1_024), np.uint16))

    states = HiddenStates(path, hidden, num_tokens=16_384)
    before = mapped_kib(path)
    states.rows(8_000, 4)

    assert before == 0
    assert 8 <= mapped_kib(path) <= 4 * 1_024


def mapped_kib(path: Path) -> int:
    """How much of a file is in this process's memory by its maps."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begins = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    assert begins
    return sum(int(next(line for line in lines[begin:] if line.startswith("Rss:")).split()[1]) for begin in begins)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_states_that_are_no_numbers_are_refused(path, states_TD, bits):
    states_TD[3, 4] = bits

    with pytest.raises(NonFiniteError, match=r"hidden states must be finite.*set model\.dtype to float32"):
        write_hidden(path, states_TD)
    assert not path.exists()


def test_the_largest_finite_state_is_kept(path, states_TD):
    states_TD[3, 4] = 0xFF7F

    assert HiddenStates(path, write_hidden(path, states_TD), num_tokens=NUM_TOKENS).rows(3, 1)[0, 4] == 0xFF7F


def test_a_file_of_another_size_or_shape_is_refused(path, states_TD):
    hidden = write_hidden(path, states_TD)

    check_hidden(path, hidden, num_tokens=NUM_TOKENS)
    with pytest.raises(ShardError, match=r"must have \d+ bytes, got \d+; delete its label file"):
        HiddenStates(path, hidden, num_tokens=NUM_TOKENS - 1)
    write_hidden(path, states_TD.reshape(WIDTH, NUM_TOKENS))  # as many bytes
    with pytest.raises(ShardError, match=r"must begin with .*\[50, 24\].*, got .*\[24, 50\]"):
        HiddenStates(path, hidden, num_tokens=NUM_TOKENS)
    path.unlink()
    with pytest.raises(ShardError, match="must be readable, got 'No such file or directory'"):
        HiddenStates(path, hidden, num_tokens=NUM_TOKENS)


def test_a_flipped_bit_is_found_where_the_whole_file_is_asked_for(path, states_TD):
    hidden = write_hidden(path, states_TD)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)

    check_hidden(path, hidden, num_tokens=NUM_TOKENS)
    with pytest.raises(ShardError, match=r"must have sha256 \w{12}, got \w{12}; it is damaged"):
        check_hidden(path, hidden, num_tokens=NUM_TOKENS, is_whole=True)
