import pytest

from tests.helpers.packing import hashes_of, pack_tones
from tests.helpers.tones import make_recordings, write_tone


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Thirty tones, one of them damaged, and the hashes of their pack by one process."""
    folder = tmp_path_factory.mktemp("source")
    recordings = make_recordings(folder / "in", 30)
    (folder / "in" / "7.wav").write_bytes(b"no audio")
    pack_tones(recordings, folder / "pack", max_rejected_share=0.1)
    return folder, recordings, hashes_of(folder / "pack")


def test_two_processes_write_the_same_bytes_as_one(source, tmp_path):
    _, recordings, expected = source

    pack_tones(recordings, tmp_path / "pack", max_rejected_share=0.1, processes=2)

    assert hashes_of(tmp_path / "pack") == expected


def test_packing_again_in_the_same_folder_or_another_order_gives_the_same_bytes(source):
    folder, recordings, expected = source

    pack_tones(recordings[::-1], folder / "pack", max_rejected_share=0.1)

    assert hashes_of(folder / "pack") == expected


def test_another_seed_gives_other_shards(source, tmp_path):
    _, recordings, expected = source

    pack_tones(recordings, tmp_path / "pack", max_rejected_share=0.1, seed=1)

    assert hashes_of(tmp_path / "pack")["train-000000.tar"] != expected["train-000000.tar"]


def test_another_sound_in_one_recording_changes_only_its_shard(source, tmp_path):
    folder, recordings, expected = source
    kept = (folder / "in" / "3.wav").read_bytes()
    write_tone(folder / "in" / "3.wav", 103)
    try:
        pack_tones(recordings, tmp_path / "pack", max_rejected_share=0.1)
    finally:
        (folder / "in" / "3.wav").write_bytes(kept)

    found = hashes_of(tmp_path / "pack")
    changed = {name for name in expected if found[name] != expected[name]}
    assert len([name for name in changed if name.endswith(".tar")]) == 1
