import json
from collections import Counter
from pathlib import Path

import pytest

from qad_dist.config import RunConfig
from qad_dist.config.model import ModelConfig
from qad_dist.config.pack import PackConfig
from qad_dist.config.splice import SpliceConfig
from qad_dist.runtime.record import is_finished, require_stage
from qad_dist.stages import pack as stage
from shards.errors import ConfigError, ShardError, SourceError, StageError
from shards.index import read_index, read_utterances
from tests.helpers.packing import hashes_of
from tests.helpers.tones import write_tone


@pytest.fixture
def run(tmp_path) -> RunConfig:
    rows = []
    for number in range(12):
        write_tone(tmp_path / "set" / f"{number}.wav", number, seconds=0.5)
        rows.append(
            {"audio": f"{number}.wav", "lang": ("en", "vi")[number % 2], "split": "test" if number > 9 else "train"}
        )
    write_tone(tmp_path / "set" / "short.wav", 12, seconds=0.05)
    rows.append({"audio": "short.wav", "lang": "de", "split": "train"})
    (tmp_path / "set" / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack = PackConfig(inputs=[str(tmp_path / "set" / "m.jsonl")], holdout=0.2, max_rejected_share=0.1, processes=1)
    return RunConfig(run=str(tmp_path / "run"), model=ModelConfig(path="none"), pack=pack)


def test_the_stage_packs_and_records_what_it_made(run, capsys):
    stage.run(run)

    folder = run.stage_folder("pack")
    results = json.loads((folder / "done.json").read_text())["results"]
    assert results["fingerprint"] == read_index(folder).fingerprint
    assert (results["num_recordings"], results["num_utterances"], results["num_rejected"]) == (13, 12, 1)
    assert results["rejected_by_reason"] == {"too short": 1}
    assert results["hours"] == pytest.approx(12 * 0.5 / 3600)
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in reversed(lines) if line}  # the first table has the last word
    assert cells["English"] == ["4", "(0.001)", "1", "(0.000)", "1", "(0.000)", "6", "(0.001)", "0"]
    assert cells["German"][-3:] == ["0", "(0.000)", "1"]
    assert cells["all"][-3:] == ["12", "(0.002)", "1"]
    assert "rejected: too short: 1" in lines


def test_a_finished_stage_is_left_alone_and_a_changed_setting_packs_again(run):
    stage.run(run)
    before = hashes_of(run.stage_folder("pack"))

    stage.run(run)
    assert hashes_of(run.stage_folder("pack")) == before

    changed = run.model_copy(update={"pack": run.pack.model_copy(update={"utterances_per_shard": 2})})
    stage.run(changed)
    assert len(read_index(run.stage_folder("pack")).shards) == 5 + 1 + 1  # of 9, 2 and 2 recordings


def test_verify_names_the_damaged_shard(run, caplog):
    stage.run(run)
    caplog.set_level("INFO")
    stage.verify(run)
    assert "verified shards=3 utterances=12" in caplog.text
    path: Path = run.stage_folder("pack") / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ShardError, match=r"train-000000\.tar must have \d+ bytes"):
        stage.verify(run)


def test_a_dry_run_tells_hours_and_shards_and_writes_nothing(run, capsys):
    stage.dry_run(run)

    assert capsys.readouterr().out.splitlines() == [
        "train: 9 recordings, about 0.001 h, 1 shards",
        "heldout: 2 recordings, about 0.000 h, 1 shards",
        "test: 2 recordings, about 0.000 h, 1 shards",
    ]
    assert not run.folder.exists()


def test_utterances_carry_what_the_manifest_says(run):
    stage.run(run)

    utterances = {utterance.key: utterance for utterance in read_utterances(run.stage_folder("pack"))}
    assert set(utterances) == {str(number) for number in range(12)}
    assert {key for key, utterance in utterances.items() if utterance.split == "test"} == {"10", "11"}
    assert utterances["3"].language == "Vietnamese"
    assert utterances["3"].source == "set"


def test_an_unknown_split_stops_before_anything_is_written(run):
    changed = run.model_copy(update={"pack": run.pack.model_copy(update={"splits": {"train": "train"}})})

    with pytest.raises(ConfigError, match=r"pack\.splits must list every split of the sources, got 'test'"):
        stage.run(changed)

    assert not (run.stage_folder("pack") / "rejected.jsonl").exists()


def change(run: RunConfig, **settings: object) -> RunConfig:
    return run.model_copy(update={"pack": run.pack.model_copy(update=settings)})


def test_an_edit_that_is_refused_and_undone_leaves_the_finished_pack_as_it_was(run, tmp_path):
    stage.run(run)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.stage_folder("pack").iterdir()}
    (tmp_path / "set" / "n.jsonl").write_text('{"audio": "more.wav", "split": "validation"}\n')

    with pytest.raises(ConfigError, match=r"pack\.splits must list every split of the sources, got 'validation'"):
        stage.run(change(run, inputs=[*run.pack.inputs, str(tmp_path / "set" / "n.jsonl")]))
    for path in (tmp_path / "set").glob("*.wav"):
        path.unlink()
    with pytest.raises(SourceError, match=r"got 13 of 13 missing, first .*; undo the change, or remove the folder"):
        stage.run(change(run, holdout=0.5))

    assert is_finished(run, "pack")
    assert require_stage(run, "pack")["results"]["num_utterances"] == 12
    stage.run(run)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.stage_folder("pack").iterdir()} == before


def test_jobs_of_an_array_make_the_pack_that_one_program_makes(run, tmp_path):
    whole = run.model_copy(update={"run": str(tmp_path / "whole")})
    stage.run(whole)
    small = change(run, utterances_per_shard=3)
    stage.run(small.model_copy(update={"run": str(tmp_path / "whole")}))

    stage.plan(small)
    stage.run(small, array="1/2")
    unfinished = small.stage_folder("pack") / ".train-000000.tar.0123abcd.tmp"  # of the job that still runs
    unfinished.write_bytes(b"half")
    with pytest.raises(
        StageError, match=r"must hold all 5 shards of its plan .* got 3 that are not, first train-000000"
    ):
        stage.merge(small)
    assert unfinished.exists() and not is_finished(small, "pack")
    stage.run(small, array="0/2")
    stage.merge(small)

    assert is_finished(small, "pack")
    names = {path.name for path in small.stage_folder("pack").iterdir()} - {"done.json"}
    ours, others = (hashes_of(folder) for folder in (small.stage_folder("pack"), tmp_path / "whole" / "pack"))
    assert names == others.keys() - {"done.json"}
    assert [ours[name] for name in names] == [others[name] for name in names]


@pytest.mark.parametrize("array", ["2/2", "1", "a/b", "-1/2", "1/0", "٠/٢"])
def test_a_job_number_that_makes_no_sense_is_refused(run, array):
    with pytest.raises(ConfigError, match=r"--array must be I/N with I from 0 to N - 1"):
        stage.run(run, array=array)


def test_jobs_of_an_array_need_the_plan_of_their_config(run):
    with pytest.raises(
        StageError, match=r"must hold the plan of this config, got none; run `python launch/pack.py plan"
    ):
        stage.run(run, array="0/2")
    stage.plan(run)

    with pytest.raises(StageError, match=r"must hold the plan of this config, got none"):
        stage.run(change(run, holdout=0.5), array="0/2")


def test_a_damaged_plan_is_made_again(run):
    stage.plan(run)
    path = run.stage_folder("pack") / "tasks.arrow"
    path.write_bytes(path.read_bytes()[:100])

    stage.run(run)

    assert is_finished(run, "pack") and not path.exists()


def test_splices_of_training_speech_pack_beside_it_as_another_run(run, tmp_path, capsys):
    stage.run(run)
    run = run.model_copy(update={"splice": SpliceConfig(utterances=7, piece_seconds=(0.2, 0.4))})
    stage.splice(run)

    folders = [str(run.stage_folder(name)) for name in ("pack", "splice")]
    pack = run.pack.model_copy(update={"inputs": folders, "in_place": True, "holdout": 0})
    second = run.model_copy(update={"run": str(tmp_path / "second"), "pack": pack})
    stage.run(second)

    before, after = (list(read_utterances(one.stage_folder("pack"))) for one in (run, second))
    assert Counter(one.split for one in after) == Counter(one.split for one in before) + Counter(train=7)
    assert f"7 utterances of pieces in {folders[1]}" in capsys.readouterr().out
    stage.verify(second, deep=True)
    # Each half of the tones is of one language, and so is each splice.
    assert {one.language for one in after if one.key.startswith("splice")} <= {"English", "Vietnamese"}


def test_splices_need_packed_speech_of_the_sources_that_were_named(run):
    with pytest.raises(StageError, match="must be finished before this stage"):
        stage.splice(run)
    stage.run(run)
    with pytest.raises(ConfigError, match=r"splice\.sources must be sources of this speech .*, got nobody"):
        stage.splice(run.model_copy(update={"splice": SpliceConfig(sources=("nobody",))}))
