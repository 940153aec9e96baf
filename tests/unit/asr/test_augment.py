"""Altered copies: lengths told beforehand, speeds heard, noise as loud as asked, and no bit left to chance."""

import hashlib
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qad_dist.asr.augment import IDENTITY, Variant, augment, augmented_samples, choose_speeds, choose_variant
from qad_dist.config.augment import AugmentConfig
from shards.audio import Samples
from tests.helpers.tones import make_tone

# Without subnormals: libraries that are loaded beside this test make the processor flush them to 0.
DECIBELS = st.floats(-60, 60, allow_subnormal=False)
KEYS = [f"utt-{i}" for i in range(2000)]
USUAL = AugmentConfig(copies=3)


def variant_of(*, speed: float = 1.0, gain_db: float = 0.0, snr_db: float | None = None, seed: int = 0) -> Variant:
    return Variant(speed=speed, gain_db=gain_db, snr_db=snr_db, seed=seed)


def peak_hz(audio: Samples) -> float:
    """Where the spectrum is highest, to 1 Hz."""
    return float(np.abs(np.fft.rfft(audio * np.hanning(len(audio)), n=16_000)).argmax())


def power(audio: Samples) -> float:
    return float(np.mean(np.square(audio, dtype=np.float64)))


@given(num_samples=st.integers(1, 20_000_000), speed=st.floats(0.5, 2.0))
def test_length_is_that_of_the_utterance_divided_by_the_speed(num_samples: int, speed: float) -> None:
    steps = round(Fraction(speed) * 16_000)  # the speed, in steps of 1/16,000
    exact = Fraction(num_samples * 16_000, steps)

    found = augmented_samples(num_samples, speed)

    assert found == int(exact + Fraction(1, 2))
    assert augmented_samples(np.array([num_samples]), np.array([[speed], [1.0]])).tolist() == [[found], [num_samples]]


@settings(deadline=None, max_examples=200)
@given(
    num_samples=st.integers(1, 20_000),
    speed=st.one_of(st.sampled_from([0.5, 0.9, 0.95, 1.0, 1.05, 1.1, 2.0]), st.floats(0.5, 2.0)),
    snr_db=st.one_of(st.none(), DECIBELS),
    gain_db=DECIBELS,
    seed=st.integers(0, 2**64 - 1),
)
def test_what_comes_out_is_as_long_as_told_and_never_clipped(
    num_samples: int, speed: float, snr_db: float | None, gain_db: float, seed: int
) -> None:
    audio = np.random.default_rng(num_samples).uniform(-1, 1, num_samples).astype(np.float32)

    found = augment(audio, variant_of(speed=speed, gain_db=gain_db, snr_db=snr_db, seed=seed))

    assert found.dtype == np.float32
    assert len(found) == augmented_samples(num_samples, speed)
    assert np.abs(found).max() <= 1  # false of NaN, too


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 2.0])
def test_faster_is_higher_and_shorter_from_the_first_sample_on(speed: float) -> None:
    audio = make_tone(20, seconds=2.0)  # 400 Hz

    found = augment(audio, variant_of(speed=speed))

    assert len(found) == round(32_000 / speed)
    assert peak_hz(found) == pytest.approx(400 * speed, abs=1)
    expected = 0.5 * np.sin(2 * np.pi * 400 * speed * np.arange(len(found)) / 16_000)
    inner = slice(400, -400)  # the filter sees nothing beyond the ends
    np.testing.assert_allclose(found[inner], expected[inner], rtol=0, atol=1e-3)


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("snr_db", [-3.0, 10.0, 17.5, 30.0])
def test_noise_is_as_loud_as_asked_beside_the_whole_utterance(snr_db: float, speed: float) -> None:
    audio = make_tone(20, seconds=2.0) * np.float32(0.1)
    audio[16_000:] = 0  # a pause: the mean power of 0.05 times a sine over half of the time is 0.05^2 / 4
    clean = augment(audio, variant_of(speed=speed))

    noisy = augment(audio, variant_of(speed=speed, snr_db=snr_db, seed=7))

    assert power(clean) == pytest.approx(0.05**2 / 4, rel=0.01)
    assert 10 * np.log10(power(clean) / power(noisy - clean)) == pytest.approx(snr_db, abs=0.05)
    assert power((noisy - clean)[-4000:]) > 0.5 * power(noisy - clean)  # in the pause as well


def test_noise_has_colours_from_white_to_pink() -> None:
    audio = make_tone(20, seconds=4.0) * np.float32(1e-3)
    hertz = np.fft.rfftfreq(len(audio), 1 / 16_000)
    low, high = ((hertz > edge) & (hertz < 2 * edge) for edge in (100, 3200))

    falls = []
    for seed in range(60):
        noise = augment(audio, variant_of(snr_db=-20.0, seed=seed)) - audio
        density = np.abs(np.fft.rfft(noise)) ** 2
        falls.append(float(density[low].mean() / density[high].mean()))

    # White noise is level, and pink noise falls by the ratio of the frequencies, 32; 400 bins are known to about 10 %.
    assert 0.8 < min(falls) < 3
    assert 15 < max(falls) < 32 * 1.2


@pytest.mark.parametrize("size", [800, 16_000, 30_011, 65_536])
def test_noise_does_not_repeat_itself(size: int) -> None:
    audio = np.full(size, 1e-3, np.float32)

    first, second = (augment(audio, variant_of(snr_db=0.0, seed=seed)) - audio for seed in (1, 2))

    halves = np.split(first[: size // 2 * 2], 2)
    for one, other in ((first, second), halves):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.25


def test_gain_multiplies_and_is_less_where_the_copy_would_be_clipped() -> None:
    audio = make_tone(3)  # half of full scale

    softer = augment(audio, variant_of(gain_db=-20.0))
    louder = augment(audio, variant_of(gain_db=3.0))
    limited = augment(audio, variant_of(gain_db=20.0))

    np.testing.assert_allclose(softer, audio / 10, rtol=1e-6)
    np.testing.assert_allclose(louder, audio * 10 ** (3 / 20), rtol=1e-6)
    np.testing.assert_allclose(limited, audio / np.abs(audio).max(), rtol=1e-6, atol=1e-7)  # a sine still


def test_limited_gain_leaves_the_noise_as_far_below_the_utterance() -> None:
    audio = make_tone(3)
    noisy = augment(audio * np.float32(0.1), variant_of(snr_db=5.0, seed=4))

    limited = augment(audio, variant_of(gain_db=30.0, snr_db=5.0, seed=4))

    np.testing.assert_allclose(limited, noisy / np.abs(noisy).max(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_samples", [1, 2, 201, 16_000])
def test_silence_stays_silence(num_samples: int) -> None:
    variant = variant_of(speed=0.9, gain_db=60.0, snr_db=-60.0, seed=1)

    found = augment(np.zeros(num_samples, np.float32), variant)

    assert found.dtype == np.float32
    assert found.tolist() == [0.0] * augmented_samples(num_samples, 0.9)


def test_copy_0_is_the_utterance_itself() -> None:
    audio = make_tone(1)

    assert {choose_variant(key, 0, USUAL, seed) for key in KEYS[:50] for seed in range(3)} == {IDENTITY}
    assert augment(audio, IDENTITY) is audio


def test_variant_depends_on_key_copy_and_seed() -> None:
    chosen = [choose_variant(key, copy, USUAL, seed) for key in KEYS[:20] for copy in (1, 2, 3) for seed in (0, 1)]

    assert len(set(chosen)) == len({variant.seed for variant in chosen}) == 120
    assert choose_variant("a", 1, USUAL, 0) != choose_variant("a\n1", 1, USUAL, 0)
    # What more copies there are changes nothing about the first ones.
    assert choose_variant("a", 2, AugmentConfig(copies=9), 0) == choose_variant("a", 2, USUAL, 0)


def test_variants_fill_the_bounds_of_the_settings() -> None:
    config = AugmentConfig(copies=1, speeds=(0.8, 1.2), noise_share=0.25, noise_snr_db=(5, 15), gain_db=(-2, 4))

    chosen = [choose_variant(key, 1, config, 0) for key in KEYS]

    snrs = [variant.snr_db for variant in chosen if variant.snr_db is not None]
    gains = [variant.gain_db for variant in chosen]
    # Four standard deviations of 2,000 draws.
    assert len(snrs) / 2000 == pytest.approx(0.25, abs=0.04)
    assert sum(variant.speed == 0.8 for variant in chosen) / 2000 == pytest.approx(0.5, abs=0.045)
    assert {variant.speed for variant in chosen} == {0.8, 1.2}
    for values, low, high in ((snrs, 5, 15), (gains, -2, 4)):
        assert low <= min(values) < low + 0.1
        assert high - 0.1 < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.6)
    # Loud copies are as often noisy as soft ones.
    assert abs(np.corrcoef(gains, [variant.snr_db is None for variant in chosen])[0, 1]) < 0.09


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 2000)])
def test_share_of_noise_may_be_none_or_all(share: float, expected: int) -> None:
    config = AugmentConfig(copies=1, noise_share=share)

    assert sum(choose_variant(key, 1, config, 0).snr_db is not None for key in KEYS) == expected


def test_copies_of_an_utterance_take_the_speeds_in_turns() -> None:
    config = AugmentConfig(copies=4, speeds=(0.9, 1.0, 1.1, 1.2))

    speeds = choose_speeds(KEYS, config, seed=5)

    assert speeds.shape == (5, 2000)
    assert (speeds[0] == 1).all()
    assert (np.sort(speeds[1:], axis=0).T == [0.9, 1.0, 1.1, 1.2]).all()
    for first in (0.9, 1.0, 1.1, 1.2):
        assert np.mean(speeds[1] == first) == pytest.approx(0.25, abs=0.04)
    for copy in range(1, 5):
        assert [choose_variant(key, copy, config, 5).speed for key in KEYS[:50]] == speeds[copy, :50].tolist()


def test_speeds_without_copies_are_those_of_the_utterances() -> None:
    assert choose_speeds(iter(KEYS), AugmentConfig(), seed=0).tolist() == [[1.0] * 2000]


def test_rules_of_version_1_are_unchanged() -> None:
    chosen = choose_variant("utt-0", 2, USUAL, 0)

    digest = hashlib.blake2b(b"0\nutt-0\n2", digest_size=32).digest()
    gain, noise, snr, seed = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16, 24))
    start = int.from_bytes(hashlib.blake2b(b"0\nutt-0", digest_size=8).digest(), "little")
    assert chosen.speed == [0.9, 1.0, 1.1][(start % 3 + 2) % 3]
    assert chosen.gain_db == pytest.approx(-6 + 12 * gain / 2**64, abs=1e-12)
    assert chosen.snr_db == (pytest.approx(10 + 20 * snr / 2**64, abs=1e-12) if noise < 2**63 else None)
    assert chosen.seed == seed


def test_every_process_makes_the_same_copies() -> None:
    program = (
        "import hashlib\n"
        "from qad_dist.asr.augment import augment, choose_variant\n"
        "from qad_dist.config.augment import AugmentConfig\n"
        "from tests.helpers.tones import make_tone\n"
        "digest = hashlib.sha256()\n"
        "for i in range(6):\n"
        "    variant = choose_variant(f'utt-{i}', 1, AugmentConfig(copies=1, noise_share=1), 3)\n"
        "    digest.update(repr(variant).encode() + augment(make_tone(i, seconds=1.1), variant).tobytes())\n"
        "print(digest.hexdigest())\n"
    )

    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (0, 1)
    }

    digest = hashlib.sha256()
    for i in range(6):
        variant = choose_variant(f"utt-{i}", 1, AugmentConfig(copies=1, noise_share=1), 3)
        digest.update(repr(variant).encode() + augment(make_tone(i, seconds=1.1), variant).tobytes())
    assert found == {digest.hexdigest() + "\n"}
