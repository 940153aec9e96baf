"""Formats side by side: ratios of sums, paired intervals, and what is printed of them."""

import numpy as np
import pytest

from qad_dist.text.comparison import Measured, compare_formats, comparison_markdown, comparison_summary


def measured(kl_U: list[float], *, agreements_U: list[int] | None = None, served_bytes: int = 1_000_000) -> Measured:
    tokens_U = np.array([4, 6, 10])[: len(kl_U)]
    return Measured(
        kl_U=np.array(kl_U),
        agreements_U=tokens_U if agreements_U is None else np.array(agreements_U),
        tokens_U=tokens_U,
        served_bytes=served_bytes,
    )


def test_rates_are_sums_divided_once() -> None:
    found = compare_formats({"int8": measured([0.4, 0.0, 0.1], agreements_U=[3, 6, 10])}, chosen="int8")

    assert found["formats"]["int8"]["kl_per_token"] == pytest.approx(0.5 / 20)
    assert found["formats"]["int8"]["agreement"] == pytest.approx(19 / 20)
    assert (found["utterances"], found["response_tokens"]) == (3, 20)


def test_format_with_half_the_kl_of_every_utterance_has_half_of_it_for_certain() -> None:
    """Paired: each rate has an interval, their ratio has none."""
    full, half = measured([0.4, 0.2, 0.1]), measured([0.2, 0.1, 0.05])

    found = compare_formats({"w4a8": half, "int8": full}, chosen="int8")["formats"]

    assert list(found) == ["int8", "w4a8"]  # the chosen one first
    assert found["w4a8"]["share_of_chosen"] == pytest.approx(0.5)
    assert found["w4a8"]["share_interval"] == pytest.approx([0.5, 0.5])
    assert found["int8"]["share_of_chosen"] is None
    low, high = found["int8"]["kl_interval"]
    assert low < found["int8"]["kl_per_token"] < high


def test_single_utterance_has_no_interval() -> None:
    found = compare_formats({"int8": measured([0.4]), "fp8": measured([0.8])}, chosen="int8")["formats"]

    assert found["int8"]["kl_interval"] is None
    assert found["fp8"]["share_of_chosen"] is None


def test_tables_show_small_numbers_in_full() -> None:
    comparison = {
        "chosen": "int8",
        "utterances": 87,
        "response_tokens": 769,
        "formats": {
            "int8": {
                "kl_per_token": 0.00026643,
                "kl_interval": [0.000221, 0.000314],
                "share_of_chosen": None,
                "share_interval": None,
                "agreement": 0.9987,
                "served_bytes": 3_037_920,
            },
            "int8_weight_only": {
                "kl_per_token": 0.0000184,
                "kl_interval": [0.0000161, 0.000021],
                "share_of_chosen": 0.0694,
                "share_interval": [0.0574, 0.0838],
                "agreement": 1.0,
                "served_bytes": 3_037_920,
            },
        },
    }

    lines = comparison_markdown(comparison).splitlines()

    assert lines[2] == "| format | KL | 95 % | of int8's | 95 % | top-1 % | served MB |"
    assert lines[4] == "| int8 | 266 | 221 to 314 | - | - | 99.87 | 3.0 |"
    assert lines[5] == "| int8_weight_only | 18.4 | 16.1 to 21.0 | 0.0694 | 0.0574 to 0.0838 | 100.00 | 3.0 |"
    assert "87 held-out utterances (769 tokens)" in comparison_summary(comparison)
    assert max(map(len, comparison_summary(comparison).splitlines())) <= 132


def test_single_format_is_no_share_of_another() -> None:
    comparison = compare_formats({"int8": measured([0.4, 0.2, 0.1])}, chosen="int8")

    header = comparison_markdown(comparison).splitlines()[2]

    assert header == "| format | KL | 95 % | top-1 % | served MB |"
