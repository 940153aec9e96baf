import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import NonFiniteError, ShardError, StageError
from shards.index import INDEX, read_index, read_utterances
from shards.labels import LabelHeader, read_labels, write_labels
from shards.pack import Progress
from shards.read import Shards
from shards.schema import PseudoLabel, Recording
from shards.verify import verify
from tests.helpers.packing import hashes_of, pack_tones
from tests.helpers.tones import make_recordings, number_of, write_tone


@pytest.fixture
def folder(tmp_path) -> Path:
    pack_tones(make_recordings(tmp_path / "in", 24), tmp_path / "pack", utterances_per_shard=6)
    verify(tmp_path / "pack")
    return tmp_path / "pack"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_cut_shard_is_named(folder, quick, share):
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    with pytest.raises(ShardError, match=r"train-000001\.tar must have \d+ bytes"):
        verify(folder, quick=quick)


def test_a_shard_cut_between_two_utterances_is_noticed_when_they_are_read(folder):
    utterances = [u for u in read_utterances(folder) if u.shard == "train-000001.tar"]
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: utterances[3].audio_offset - 512])

    assert len(Shards(folder).read(utterances[:3])) == 3
    with pytest.raises(ShardError, match=rf"{utterances[3].key}' must have \d+ bytes, got 0; the shard was cut"):
        Shards(folder).read(utterances)


@pytest.mark.parametrize("place", ["audio", "json", "header"])
def test_one_flipped_bit_is_found_by_a_full_verify(folder, place):
    utterance = next(u for u in read_utterances(folder) if u.shard == "train-000001.tar")
    offset = {"audio": utterance.audio_offset + 99, "json": utterance.json_offset + 9, "header": 5}[place]
    flip(folder / utterance.shard, offset)

    verify(folder, quick=True)  # sizes are as they were
    with pytest.raises(ShardError, match=r"train-000001\.tar must have sha256"):
        verify(folder)


def test_a_shard_in_the_place_of_another_is_not_read_as_it(tmp_path):
    """All utterances last as long and lie at the same places: only their names differ."""
    recordings = [
        Recording(path=str(write_tone(tmp_path / "in" / f"{i}.wav", i)), key=f"tone-{i}", source="tones")
        for i in range(8)
    ]
    folder = tmp_path / "pack"
    pack_tones(recordings, folder, holdout=0, utterances_per_shard=4)
    first, second = (next(u for u in read_utterances(folder) if u.shard == f"train-00000{i}.tar") for i in (0, 1))
    assert first.audio_offset == second.audio_offset
    (folder / second.shard).write_bytes((folder / first.shard).read_bytes())

    with pytest.raises(
        ShardError, match=rf"'{second.key}' must be where the index says, got b'{first.key}\.flac' there"
    ):
        Shards(folder).read([replace(second, audio_bytes=first.audio_bytes)])
    assert number_of(Shards(folder).read([first])[0]) == int(first.key.removeprefix("tone-"))


def test_a_missing_shard_is_named(folder):
    utterance = next(u for u in read_utterances(folder) if u.shard == "heldout-000000.tar")
    (folder / "heldout-000000.tar").unlink()

    with pytest.raises(ShardError, match=r"heldout-000000\.tar must exist"):
        verify(folder, quick=True)
    with pytest.raises(ShardError, match=r"heldout-000000\.tar must be readable, got 'No such file"):
        Shards(folder).read([utterance])


def test_a_missing_index_means_that_packing_was_not_finished(folder):
    (folder / INDEX).unlink()

    for read in (read_index, read_utterances, verify):
        with pytest.raises(ShardError, match=r"index\.json must exist, got no such file; run the pack stage"):
            read(folder)


def test_a_damaged_table_is_refused(folder):
    flip(folder / "utterances.parquet", 200)

    with pytest.raises(ShardError, match=r"utterances\.parquet must have sha256"):
        read_utterances(folder)


@pytest.fixture
def label_file(tmp_path) -> Path:
    header = LabelHeader(shard="train-000000.tar", shard_sha256="0" * 64, teacher="t", settings={})
    labels = [
        PseudoLabel(
            key=f"k{i}",
            token_ids=(1, 2),
            text="one",
            language="English",
            token_logprobs=(-0.5, -0.25),
            mean_logprob=-0.375,
            ended_by="end_token",
            duration_seconds=1.0,
        )
        for i in range(4)
    ]
    write_labels(tmp_path / "train-000000.jsonl", header, labels)
    return tmp_path / "train-000000.jsonl"


def test_a_label_file_cut_anywhere_is_refused(label_file):
    data = label_file.read_bytes()
    for length in range(0, len(data), 7):
        label_file.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"must (begin with a header|hold 4 labels|have the hash)"):
            read_labels(label_file)


def test_a_label_file_cut_between_two_labels_says_how_many_are_there(label_file):
    label_file.write_bytes(b"".join(label_file.read_bytes().splitlines(keepends=True)[:3]))

    with pytest.raises(ShardError, match=r"train-000000\.jsonl must hold 4 labels, got 2; delete it and label again"):
        read_labels(label_file)


def test_a_changed_label_is_refused_though_the_header_is_good(label_file):
    label_file.write_bytes(label_file.read_bytes().replace(b'"one"', b'"two"', 1))

    with pytest.raises(ShardError, match="must have the hash in its header"):
        read_labels(label_file)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_probability_that_is_no_number_is_named_and_nothing_is_written(label_file, value):
    header, labels = read_labels(label_file)
    before = label_file.read_bytes()
    bad = replace(labels[2], token_logprobs=(-0.5, value), mean_logprob=value)

    with pytest.raises(NonFiniteError, match=r"log-probabilities of 'k2' must be finite, got (nan|-inf); "):
        write_labels(label_file, header, [*labels[:2], bad])
    assert label_file.read_bytes() == before


class InterruptError(Exception):
    """Stands for Ctrl-C in the middle of a pack."""


def test_an_interrupted_pack_has_no_index_and_goes_on_where_it_was(tmp_path):
    recordings = make_recordings(tmp_path / "in", 24)
    pack_tones(recordings, tmp_path / "whole", utterances_per_shard=6)
    reported = []

    def interrupt(progress: Progress) -> None:
        reported.append(progress)
        if len(reported) == 2:
            raise InterruptError

    with pytest.raises(InterruptError):
        pack_tones(recordings, tmp_path / "pack", utterances_per_shard=6, progress=interrupt)
    assert not (tmp_path / "pack" / INDEX).exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").glob("*.tar")}
    assert len(kept) == 2

    pack_tones(recordings, tmp_path / "pack", utterances_per_shard=6)

    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not packed again
    assert hashes_of(tmp_path / "pack") == hashes_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut tar", "no tar", "cut part", "other audio"])
def test_a_kept_shard_that_no_longer_holds_is_packed_again(tmp_path, damage):
    recordings = make_recordings(tmp_path / "in", 24)
    pack_tones(recordings, tmp_path / "pack", utterances_per_shard=24, holdout=0)
    expected = hashes_of(tmp_path / "pack")

    def interrupt(progress: Progress) -> None:
        raise InterruptError

    with pytest.raises(InterruptError):
        pack_tones(recordings, tmp_path / "pack", utterances_per_shard=24, holdout=0, progress=interrupt)
    assert not (tmp_path / "pack" / INDEX).exists()  # the finished one that was there does not count any more
    tar, part = tmp_path / "pack/train-000000.tar", tmp_path / "pack/train-000000.tar.part.json"
    if damage == "cut tar":
        tar.write_bytes(tar.read_bytes()[:5000])
    elif damage == "no tar":
        tar.unlink()
    elif damage == "cut part":
        part.write_bytes(part.read_bytes()[:500])
    else:
        Path(recordings[0].path).write_bytes(Path(recordings[8].path).read_bytes())  # same length

    pack_tones(recordings, tmp_path / "pack", utterances_per_shard=24, holdout=0)

    verify(tmp_path / "pack")
    assert (hashes_of(tmp_path / "pack") == expected) == (damage != "other audio")


@pytest.mark.parametrize("mended", [True, False])
def test_what_was_rejected_is_tried_again_when_an_interrupted_pack_goes_on(tmp_path, monkeypatch, mended):
    recordings = make_recordings(tmp_path / "in", 12)
    settings = {"utterances_per_shard": 6, "holdout": 0, "max_rejected_share": 0.1}
    open_file, tried = os.open, []

    def deny(path, *args, **kwargs):
        if str(path).endswith("/3.wav"):
            tried.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    def interrupt(progress: Progress) -> None:
        if progress.num_recordings == 12:
            raise InterruptError

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", deny)
        denied = pack_tones(recordings, tmp_path / "denied", **settings)
        with pytest.raises(InterruptError):
            pack_tones(recordings, tmp_path / "pack", **settings, progress=interrupt)
    assert denied.num_rejected == 1 and tried
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").glob("*.tar")}
    pack_tones(recordings, tmp_path / "whole", **settings)
    if not mended:
        monkeypatch.setattr(os, "open", deny)

    report = pack_tones(recordings, tmp_path / "pack", **settings)

    assert report.num_rejected == (0 if mended else 1)
    assert hashes_of(tmp_path / "pack") == hashes_of(tmp_path / ("whole" if mended else "denied"))
    packed_again = {path for path in kept if path.stat().st_mtime_ns != kept[path]}
    assert len(packed_again) == (1 if mended else 0)


_PACK_FOR_EVER = """
import sys
import time
from pathlib import Path
from tests.helpers.packing import pack_tones
from tests.helpers.tones import make_recordings

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    recordings = make_recordings(folder / "in", 120)
    print("go", flush=True)
    sleep = lambda progress: time.sleep(3600)  # behind the first shard: it cannot end before it is killed
    pack_tones(recordings, folder / "pack", utterances_per_shard=2, processes=2, progress=sleep)
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie's is empty
    except OSError:
        return False


@pytest.mark.timeout(120)
def test_a_killed_pack_leaves_no_process_and_no_index_and_goes_on_to_the_same_bytes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_PACK_FOR_EVER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stdout=subprocess.PIPE)
    pack_folder = tmp_path / "pack"
    while not list(pack_folder.glob("*.part.json")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children_of(process.pid)

    process.send_signal(signal.SIGKILL)
    process.communicate()

    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(filter(is_alive, workers))
    assert not (pack_folder / INDEX).exists()
    recordings = make_recordings(tmp_path / "in", 120)
    pack_tones(recordings, pack_folder, utterances_per_shard=2, processes=2)
    pack_tones(recordings, tmp_path / "whole", utterances_per_shard=2)
    assert hashes_of(pack_folder) == hashes_of(tmp_path / "whole")


def test_a_packing_process_that_dies_stops_the_pack_and_keeps_the_finished_shards(tmp_path):
    recordings = make_recordings(tmp_path / "in", 400)  # seconds of work behind the first shard

    killed = []

    def kill_one(progress: Progress) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    with pytest.raises(StageError, match=r"got one that died in one of \w+-\d{6}\.tar.*finished shards are kept"):
        pack_tones(recordings, tmp_path / "pack", utterances_per_shard=2, processes=2, progress=kill_one)

    assert list((tmp_path / "pack").glob("*.part.json"))
    assert not (tmp_path / "pack" / INDEX).exists()
    pack_tones(recordings, tmp_path / "pack", utterances_per_shard=2)
    verify(tmp_path / "pack")


_PACK_WITH_COPIES = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.helpers.packing import pack_tones
from tests.helpers.tones import make_recordings

if __name__ == "__main__":
    recordings = make_recordings(Path(sys.argv[1]) / "in", 12)
    recordings += [replace(recordings[i], key=f"copy-{i}", split="test") for i in (1, 4, 7)]
    pack_tones(recordings, Path(sys.argv[1]) / sys.argv[2], utterances_per_shard=4, processes=int(sys.argv[3]))
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("point", "processes"),
    [
        ("pack.after_tar", 1),
        ("pack.after_copies", 1),
        ("pack.before_index", 1),
        ("pack.after_tar,shard=train-000001.tar", 2),
    ],
)
def test_a_pack_that_is_killed_at_any_point_goes_on_to_the_same_bytes(tmp_path, point, processes):
    script = tmp_path / "script.py"
    script.write_text(_PACK_WITH_COPIES)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path]

    killed = subprocess.run(
        [*command, "pack", str(processes)], env={**environment, "QAD_FAULT": f"kill@{point}"}, capture_output=True
    )
    assert killed.returncode != 0 and (processes > 1 or killed.returncode == -signal.SIGKILL)
    assert not (tmp_path / "pack" / INDEX).exists()
    subprocess.run([*command, "pack", "1"], env=environment, check=True)
    subprocess.run([*command, "whole", "1"], env=environment, check=True)

    assert len(read_utterances(tmp_path / "pack")) == 12
    assert hashes_of(tmp_path / "pack") == hashes_of(tmp_path / "whole")
