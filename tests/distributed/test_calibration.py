"""Calibration on several ranks finds the scales that one rank finds."""

import json
from pathlib import Path

from safetensors.torch import load_file


def quantized(run: Path) -> dict[str, object]:
    return json.loads((run / "quantize" / "done.json").read_text())["results"]


def test_two_ranks_calibrate_the_same_quantizers_as_one(one_rank_run, two_rank_run):
    one, two = quantized(one_rank_run.folder), quantized(two_rank_run.folder)

    assert one["quantizers"] == 42
    assert one["calibration_utterances"] == 24
    assert two == one
    assert "event=quantized quantizers=42 alpha=1" in one_rank_run.log
    assert "rank=0 event=quantized quantizers=42 alpha=1" in two_rank_run.log


def test_two_ranks_write_the_same_student_weights_as_one(one_rank_run, two_rank_run):
    files = [run.folder / "quantize" / "student" / "model.safetensors" for run in (one_rank_run, two_rank_run)]

    assert files[0].read_bytes() == files[1].read_bytes()
    assert sum(name.endswith("_quantizer._amax") for name in load_file(files[0])) == 42
