from typing import Any

import pytest

from qad_dist.linears import LINEARS
from qad_dist.text.sensitivity_table import kl_text, sensitivity_markdown, sensitivity_summary

GROUPS = ("qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down")
BEFORE = {"qkv": 3.25, "o": 0.5, "gate_up": 12.0, "down": 2921.6}
AFTER = {"qkv": 1.0, "o": 0.25, "gate_up": 2.5, "down": 104.2}


def report_of(*layers: list[float | None], kept: tuple[str, ...] = (), **values: float | None) -> dict[str, Any]:
    """KL of each Linear in millionths; where it is None, the Linear was kept from the start."""
    linears = [
        {
            "name": f"layers.{number}.{name}",
            "group": group,
            "sqnr_db": None if kl is None else 40 - kl,
            "kl_per_token": None if kl is None else kl * 1e-6,
            "input_amax_before": BEFORE[group],
            "input_amax_after": AFTER[group],
            "outlier_share": 0.0125,
            "is_kept": kl is None or f"layers.{number}.{name}" in kept,
        }
        for number, layer in enumerate(layers)
        for name, group, kl in zip(LINEARS, GROUPS, layer, strict=True)
    ]
    measured = sorted((one for one in linears if one["kl_per_token"] is not None), key=lambda one: -one["kl_per_token"])
    return {
        "kl_per_token": values.get("kl_per_token"),
        "kl_unquantized": values.get("kl_unquantized"),
        "linears": linears,
        "worst": [one["name"] for one in measured[:5]],
        "kept": [one["name"] for one in linears if one["is_kept"]],
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return report_of(
        [1.0, 2.0, 3.0, None, 0.5, 0.25, 11.0],
        [4.0, 0.001, 0.0, 20.0, 0.125, 6.0, 30.0],
        kept=("layers.1.mlp.down_proj",),
        kl_per_token=0.00525,
        kl_unquantized=3.1e-5,
    )


def test_summary_tells_the_worst_and_what_is_kept(report: dict[str, Any]) -> None:
    assert (
        sensitivity_summary(report)
        == """\
KL to the teacher in nats per token: 0.00525 as quantized, 3.1e-05 with nothing quantized.

Linear                    |   KL | SQNR dB | amax before | after | outliers %
--------------------------+------+---------+-------------+-------+-----------
layers.1.mlp.down_proj    | 30.0 |    10.0 |       2,922 |   104 |       1.25
layers.1.self_attn.o_proj | 20.0 |    20.0 |       0.500 | 0.250 |       1.25
layers.0.mlp.down_proj    | 11.0 |    29.0 |       2,922 |   104 |       1.25
layers.1.mlp.up_proj      | 6.00 |    34.0 |        12.0 |  2.50 |       1.25
layers.1.self_attn.q_proj | 4.00 |    36.0 |        3.25 |  1.00 |       1.25

KL: to the teacher, in 1e-6 nats per token, with this Linear alone quantized; SQNR: of its output.
amax: largest magnitude of its input, before and after smoothing; outliers: input channels above 10 medians.
In high precision: layers.0.self_attn.o_proj, layers.1.mlp.down_proj.
"""
    )


def test_markdown_has_all_linears_layer_by_layer(report: dict[str, Any]) -> None:
    """The worst are bold; what was measured before it was kept has both."""
    text = sensitivity_markdown(report)

    assert text.startswith("# Sensitivity of the Linears\n\nKL to the teacher in nats per token: 0.00525 as quantized")
    assert "| layers.1.mlp.down_proj | 30.0 | 10.0 | 2,922 | 104 | 1.25 |\n" in text
    assert text.endswith("""\
- In high precision: layers.0.self_attn.o_proj, layers.1.mlp.down_proj.

## KL, in 1e-6 nats per token

| layer | q | k | v | o | gate | up | down |
|---:|---:|---:|---:|---:|---:|---:|---:|
| 0 | 1.00 | 2.00 | 3.00 | kept | 0.50 | 0.25 | **11.0** |
| 1 | **4.00** | <0.01 | 0.00 | **20.0** | 0.12 | **6.00** | **30.0** (kept) |

## SQNR, in dB

| layer | q | k | v | o | gate | up | down |
|---:|---:|---:|---:|---:|---:|---:|---:|
| 0 | 39.0 | 38.0 | 37.0 | kept | 39.5 | 39.8 | **29.0** |
| 1 | **36.0** | 40.0 | 40.0 | **20.0** | 39.9 | **34.0** | **10.0** (kept) |

## Inputs, largest magnitude before and after smoothing

| layer | qkv | o | gate_up | down |
|---:|---:|---:|---:|---:|
| 0 | 3.25 → 1.00 | 0.500 → 0.250 | 12.0 → 2.50 | 2,922 → 104 |
| 1 | 3.25 → 1.00 | 0.500 → 0.250 | 12.0 → 2.50 | 2,922 → 104 |
""")


def test_log_gets_ascii(report: dict[str, Any]) -> None:
    assert sensitivity_summary(report).isascii()


def test_layers_stand_by_number_not_by_name() -> None:
    report = report_of(*([float(number)] * 7 for number in range(12)))
    report["linears"].reverse()

    matrix = sensitivity_markdown(report).split("## KL")[1].split("## SQNR")[0]

    rows = [line.split(" | ") for line in matrix.splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[1].strip("*")) for row in rows] == [
        (f"| {number}", f"{number:.1f}" if number >= 10 else f"{number:.2f}") for number in range(12)
    ]


def test_report_without_the_whole_says_so() -> None:
    assert sensitivity_summary(report_of([1.0] * 7)).startswith("KL to the teacher, one Linear quantized.\n")


def test_only_what_is_kept_still_makes_a_report() -> None:
    text = sensitivity_markdown(report_of([None] * 7))

    assert "| 0 | kept | kept | kept | kept | kept | kept | kept |" in text


def test_error_of_nothing_has_no_decibels() -> None:
    report = report_of([1.0] * 7)
    report["linears"][2]["sqnr_db"] = None

    assert "| 0 | **39.0** | **39.0** | **-** | **39.0** |" in sensitivity_markdown(report)


@pytest.mark.parametrize(
    ("nats", "text"),
    [
        (None, "kept"),
        (0.0, "0.00"),
        (4e-9, "<0.01"),
        (-1e-12, "<0.01"),
        (-2e-8, "-0.02"),
        (9.94e-6, "9.94"),
        (9.96e-6, "10.0"),
        (9.99e-5, "99.9"),
        (1.2345e-2, "12,345"),
    ],
)
def test_kl_is_told_in_millionths_of_a_nat(nats: float | None, text: str) -> None:
    assert kl_text(nats) == text
