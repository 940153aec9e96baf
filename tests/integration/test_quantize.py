"""The quantize stage on a few spoken digits: what it writes for other formats, kept layers and the worst Linears."""

import json
from pathlib import Path

import pytest

LINEARS = 21


@pytest.fixture(scope="module")
def labelled(forks, digits, tmp_path_factory) -> Path:
    """A run that is labelled."""
    run = digits.copy_to(tmp_path_factory.mktemp("labelled") / "run")
    job = forks.start("label", "--config", digits.config, "--set", f"run={run}", ranks=1)
    assert [rank.code for rank in job.wait()] == [0]
    return run


def quantize(forks, digits, run: Path, *settings: str, ranks: int = 1):
    job = forks.start("quantize", "--config", digits.config, "--set", f"run={run}", *settings, ranks=ranks)
    ended = job.wait()
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].stderr
    return ended[0]


def read(run: Path, name: str):
    return json.loads((run / "quantize" / name).read_text())


def test_student_is_explained_and_set_beside_other_formats(forks, digits, labelled):
    settings = ("quantize.compare=[int8_weight_only, w4a8]", "quantize.keep_high_precision=['layers.1.mlp.down_proj']")

    ended = quantize(forks, digits, labelled, *settings)

    assert "event=fake_quant path=qad quantizers=42 modelopt=0" in ended.stderr
    results = read(labelled, "done.json")["results"]
    assert results["kept"] == ["layers.1.mlp.down_proj"]
    assert results["quantizers"] == 2 * (LINEARS - 1)
    assert read(labelled, "student/quantization.json") == {
        "format": "int8",
        "kept": ["layers.1.mlp.down_proj"],
        "num_layers": 3,
    }
    told = read(labelled, "sensitivity.json")
    assert len(told["linears"]) == LINEARS
    assert told["kept"] == ["layers.1.mlp.down_proj"]
    by_kl = sorted(told["linears"], key=lambda linear: -linear["kl_per_token"])
    assert told["worst"] == [linear["name"] for linear in by_kl[:5]]
    assert f"| {told['worst'][0]} |" in (labelled / "quantize" / "sensitivity.md").read_text()
    assert (labelled / "quantize" / "sensitivity.png").stat().st_size > 10_000
    formats = read(labelled, "comparison.json")["formats"]
    assert list(formats) == ["int8", "int8_weight_only", "w4a8"]
    assert (
        formats["int8_weight_only"]["kl_per_token"] < formats["int8"]["kl_per_token"] < formats["w4a8"]["kl_per_token"]
    )
    assert formats["int8"]["kl_per_token"] == pytest.approx(results["heldout_kl"])
    assert formats["w4a8"]["served_bytes"] < formats["int8_weight_only"]["served_bytes"]
    assert "int8_weight_only |" in ended.stdout


def test_auto_keeps_as_few_groups_as_the_budget_needs(forks, digits, labelled):
    quantize(forks, digits, labelled)
    without = read(labelled, "done.json")["results"]["heldout_kl"]
    budget = without / 2

    ended = quantize(forks, digits, labelled, "quantize.keep_high_precision=auto", f"quantize.kl_budget={budget}")

    results = read(labelled, "done.json")["results"]
    assert results["heldout_kl"] <= budget
    assert 0 < len(results["kept"]) < LINEARS
    tried = {}
    for line in ended.stderr.splitlines():
        if "event=kept " in line:
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            tried[int(words["groups"])] = float(words["kl"])
    kept = {(name.split(".")[1], _group(name)) for name in results["kept"]}
    assert tried[0] == pytest.approx(without, rel=1e-3)
    assert tried[len(kept)] <= budget < tried[len(kept) - 1]  # one fewer was tried, and was too few


def _group(name: str) -> str:
    linear = name.split(".")[-1].removesuffix("_proj")
    return {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(linear, linear)


@pytest.mark.parametrize("ranks", [2, 4])
def test_result_is_the_same_on_any_number_of_ranks(forks, digits, labelled, tmp_path, ranks):
    """Weights, quantizers, and every figure, in a format that does all that there is to do."""
    settings = ("quantize.format=w4a8", "quantize.compare=[int8]", "quantize.calibration_utterances=16")
    one, many = (digits.copy_to(tmp_path / name) for name in ("one", "many"))
    for run in (one, many):
        (run / "label").symlink_to(labelled / "label")

    quantize(forks, digits, one, *settings)
    quantize(forks, digits, many, *settings, ranks=ranks)

    for name in ("sensitivity.json", "comparison.json", "student/manifest.json"):
        assert read(many, name) == read(one, name), name
    assert "model.safetensors" in read(one, "student/manifest.json")["files"]


def test_format_that_nothing_serves_is_refused_before_anything_is_read(forks, digits, tmp_path):
    job = forks.start(
        "quantize", "--config", digits.config, "--set", f"run={tmp_path}", "quantize.format=w3a8", ranks=1
    )

    (ended,) = job.wait()

    assert ended.code == 1
    assert "quantize.format must be one that export can write for a server" in ended.stderr
    assert "set quantize.research to true" in ended.stderr


def test_training_begins_where_quantize_ended(two_rank_run):
    """The KL that the stage tells is the one that training finds before its first step, by code of its own."""
    told = read(two_rank_run.folder, "done.json")["results"]["heldout_kl"]

    lines = (two_rank_run.folder / "train" / "metrics.jsonl").read_text().splitlines()
    (first,) = (entry for entry in map(json.loads, lines) if entry["step"] == 0 and "heldout_kl_per_token" in entry)
    # Other batches: float32 sums in another order, and INT8 codes at ties.
    assert first["heldout_kl_per_token"] == pytest.approx(told, rel=0.02)
