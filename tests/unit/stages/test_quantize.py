"""The quantize stage before anything is loaded; what it makes is tested in ``tests/integration``."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qad_dist.config import RunConfig
from qad_dist.runtime.world import World
from qad_dist.stages import quantize
from shards.errors import WorldError


def test_only_one_rank_reads_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get the utterances that it chose; on this rank, as on them, nothing is read."""
    run = RunConfig.model_validate({"run": str(tmp_path), "model": {"path": "unused"}, "pack": {"inputs": ["unused"]}})
    monkeypatch.setattr(quantize, "require_stage", lambda *_: None)
    monkeypatch.setattr(quantize, "choose_calibration", lambda _: pytest.fail("read the labels"))
    monkeypatch.setattr(quantize, "run_on_main", lambda _: SimpleNamespace(rows=[object(), object()]))

    def reached(_: World, num_utterances: int, *, stage: str) -> None:
        raise WorldError(f"{stage} has {num_utterances}")

    monkeypatch.setattr(quantize, "check_enough_work", reached)

    with pytest.raises(WorldError, match="quantize has 2"):
        quantize.run(run)
