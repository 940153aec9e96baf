"""Test sets by name or path: which utterances are scored, from whatever form of the corpus, and what stops it."""

import json
import logging
import shutil
import wave
from pathlib import Path
from typing import Any

import pytest

from qad_dist.test_sets import missing_test_sets, open_test_sets, prepare_test_sets
from shards.errors import AudioError, ConfigError, QadError, ShardError, SourceError
from shards.schema import Utterance
from tests.helpers.corpora import make_common_voice, make_fleurs, make_vivos, write_lines
from tests.helpers.packing import hashes_of, pack_tones
from tests.helpers.sets import CORPUS, make_mini_librispeech, make_set, opened, run_of, tones_of
from tests.helpers.tones import make_recordings, write_tone


def told(utterance: Utterance) -> tuple[Any, ...]:
    return utterance.key, utterance.language, utterance.speaker, utterance.reference


LIBRISPEECH = [
    ("1272-128104-0000", "English", "1272", "dev-clean-2 0000"),
    ("1272-128104-0001", "English", "1272", "dev-clean-2 0001"),
]
VIVOS = [("vivosdev01_r001", "Vietnamese", "VIVOSDEV01", "SỐ 1")]
FLEURS = [("vi_vn-982", "Vietnamese", None, "số 2")]
COMMON_VOICE = [("common_voice_vi_2", "Vietnamese", "speaker2", 'Số "2')]
CV = "cv-corpus-17.0-2024-03-15"


@pytest.mark.parametrize(
    ("name", "below", "expected", "tones"),
    [
        *[("librispeech-dev-clean-2", at, LIBRISPEECH, [0, 1]) for at in (".", CORPUS, f"{CORPUS}/dev-clean-2")],
        *[("vivos-test", at, VIVOS, [1]) for at in (".", "vivos", "vivos/test")],
        *[("fleurs-vi", at, FLEURS, [2]) for at in (".", "fleurs", "fleurs/vi_vn")],
        *[("common-voice-vi", at, COMMON_VOICE, [2]) for at in (".", CV, f"{CV}/vi")],
    ],
)
def test_known_set_is_its_own_split_from_every_place(
    tmp_path: Path, name: str, below: str, expected: list[tuple[Any, ...]], tones: list[int]
) -> None:
    make_mini_librispeech(tmp_path)
    make_vivos(tmp_path / "vivos")
    for language in ("vi_vn", "en_us"):
        make_fleurs(tmp_path / "fleurs" / language)
    make_common_voice(tmp_path / CV / "vi")
    run = run_of(tmp_path, {name: str(tmp_path / below)})

    (found,) = opened(run)

    assert sorted(map(told, found.utterances)) == expected
    assert sorted(tones_of(run, found)) == tones
    assert {utterance.split for utterance in found.utterances} == {"test"}
    assert (found.name, found.num_in_all, found.num_rejected) == (name, len(expected), 0)
    assert found.folder == tmp_path / "run/score/sets" / name


def test_splits_go_before_what_the_name_says(tmp_path: Path) -> None:
    make_fleurs(tmp_path / "vi_vn")
    run = run_of(tmp_path, {"fleurs-vi": {"path": str(tmp_path), "splits": ["dev", "test"]}})

    assert sorted(utterance.key for utterance in opened(run)[0].utterances) == ["vi_vn-981", "vi_vn-982"]


def test_of_fleurs_only_the_splits_that_are_scored_need_be_unpacked(tmp_path: Path) -> None:
    make_fleurs(tmp_path / "vi_vn")
    shutil.rmtree(tmp_path / "vi_vn/audio/train")
    (tmp_path / "vi_vn/audio/dev").rename(tmp_path / "vi_vn/audio/dev.tar.gz")

    (found,) = opened(run_of(tmp_path, {"fleurs-vi": str(tmp_path)}))

    assert [utterance.key for utterance in found.utterances] == ["vi_vn-982"]
    wanted = run_of(tmp_path, {"fleurs-vi": {"path": str(tmp_path), "splits": ["dev", "test"]}})
    with pytest.raises(SourceError, match=r"^score\.sets\.fleurs-vi.*must have a folder dev, got none; unpack dev"):
        opened(wanted)


def test_name_of_another_form_of_the_corpus_says_nothing(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, {"text": "a", "lang": "en"}, {"text": "b", "lang": "en", "split": "train"})
    run = run_of(tmp_path, {"librispeech-test-clean": {"path": str(manifest), "source": "qwen"}})

    assert sorted(map(told, opened(run)[0].utterances)) == [("0", "English", None, "a"), ("1", "English", None, "b")]


def test_other_names_are_all_utterances_of_any_split_as_they_are(tmp_path: Path) -> None:
    """Nothing is set aside, mapped or dropped: two recordings have the same samples, one has no reference."""
    rows = [
        {"text": f"t{number}", "split": split, "speaker": "s", "lang": "en"}
        for number, split in enumerate(["train", "val", "eval-noisy", "dev"])
    ]
    manifest = make_set(tmp_path, *rows, {})
    shutil.copy(tmp_path / "0.wav", tmp_path / "1.wav")
    run = run_of(tmp_path, {"calls": {"path": str(manifest), "language": "vi"}})

    (found,) = opened(run)

    assert sorted(map(told, found.utterances)) == [
        *[(str(number), "English", "s", f"t{number}") for number in range(4)],
        ("4", "Vietnamese", None, None),
    ]
    assert sorted(tones_of(run, found)) == [0, 0, 2, 3, 4]
    assert {utterance.split for utterance in found.utterances} == {"test"}


def test_only_chosen_splits_are_looked_at(tmp_path: Path) -> None:
    """Audio of the others is not even there."""
    manifest = make_set(tmp_path, *({"text": "x", "split": split} for split in ("train", "dev", "test")))
    (tmp_path / "0.wav").unlink()
    run = run_of(tmp_path, {"calls": {"path": str(manifest), "splits": ["test", "dev"]}})

    (found,) = opened(run)

    assert sorted(utterance.key for utterance in found.utterances) == ["1", "2"]
    assert found.num_rejected == 0


def test_own_set_comes_first_and_has_the_splits_of_the_settings(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "a", {"text": "x"})
    pack_tones(make_recordings(tmp_path / "tones", 12), tmp_path / "run/pack")
    sets = {"z": str(manifest), "b": str(manifest)}

    run = run_of(tmp_path, sets, splits=["heldout"])
    found = opened(run)

    assert [one.name for one in found] == ["own", "z", "b"]
    assert {utterance.split for utterance in found[0].utterances} == {"heldout"}
    assert found[0].folder == tmp_path / "run/pack"
    assert [one.name for one in opened(run_of(tmp_path, sets))] == ["z", "b"]


def test_long_utterances_stay_whole_and_only_those_that_no_model_takes_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_set(tmp_path, *({"text": f"t{number}"} for number in range(3)))
    write_tone(tmp_path / "1.wav", 1, seconds=3.7)
    with wave.open(str(tmp_path / "2.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(range(250)) * 32 * 1201)  # 8,000 a second
    limits = {"max_audio_seconds": 1, "max_rejected_share": 0.4}
    run = run_of(tmp_path, {"calls": str(manifest)}, pack=limits)

    (found,) = opened(run)

    lengths = {utterance.key: utterance.duration_seconds for utterance in found.utterances}
    assert lengths == {"0": pytest.approx(0.4), "1": pytest.approx(3.7)}
    assert {utterance.reference for utterance in found.utterances} == {"t0", "t1"}
    assert (found.num_in_all, found.num_rejected) == (2, 1)
    assert "test set name=calls has lost 1 of 3 recordings (too long: 1), named in" in caplog.text
    (row,) = [json.loads(line) for line in (found.folder / "rejected.jsonl").read_text().splitlines()]
    assert (row["key"], row["reason"]) == ("2", "too long: must be at most 1200 s, got 1201.00 s")


def test_subset_is_drawn_from_keys_and_seed_alone(tmp_path: Path) -> None:
    """Two folders have the same utterances in different orders, and one of them a few more in front."""
    recordings = make_recordings(tmp_path / "tones", 30)
    for name, order, per_shard in (("a", recordings, 4), ("b", recordings[::-1], 7)):
        pack_tones(order, tmp_path / name, seed=per_shard, utterances_per_shard=per_shard, holdout=0.0)
    sets = {name: str(tmp_path / name) for name in "ab"}

    def keys(seed: int, count: int | None) -> list[set[str]]:
        found = open_test_sets(run_of(tmp_path, sets, seed=seed, max_utterances=count))
        assert {one.num_in_all for one in found} == {30}
        return [{utterance.key for utterance in one.utterances} for one in found]

    every, few, more = keys(0, None), keys(0, 10), keys(0, 20)
    assert [len(some[0]) for some in (every, few, more)] == [30, 10, 20]
    assert every[0] == every[1]
    assert few[0] == few[1]
    assert few[0] < more[0]
    assert keys(0, 10) == few
    assert keys(1, 10) != few
    assert keys(0, 30) == keys(0, 99) == every


def test_subset_keeps_the_order_of_the_index_and_its_size_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack_tones(make_recordings(tmp_path / "tones", 12), tmp_path / "a", holdout=0.0)
    caplog.set_level(logging.INFO)
    (every,) = open_test_sets(run_of(tmp_path, {"a": str(tmp_path / "a")}))

    (some,) = open_test_sets(run_of(tmp_path, {"a": str(tmp_path / "a")}, max_utterances=5))

    order = [utterance.key for utterance in every.utterances]
    chosen = [utterance.key for utterance in some.utterances]
    assert chosen == [key for key in order if key in chosen]
    assert chosen != order[:5]
    assert "test set name=a utterances=5/12 hours=" in caplog.text


def test_fingerprint_is_that_of_the_chosen_content(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "a", *({"text": f"t{number}"} for number in range(6)))

    def of(at: str, **changes: Any) -> str:
        return opened(run_of(tmp_path / at, {"a": str(manifest)}, **changes))[0].fingerprint

    first = of("one")
    assert of("two", seed=5) == first
    drawn = of("one", max_utterances=3)
    assert drawn not in (first, of("one", max_utterances=4), of("one", max_utterances=3, seed=2))
    manifest.write_text(manifest.read_text().replace("t3", "t9"))
    assert of("one") != first


def test_packed_folder_is_used_where_it_is(tmp_path: Path) -> None:
    pack_tones(make_recordings(tmp_path / "tones", 12), tmp_path / "packed")
    before = hashes_of(tmp_path / "packed")
    sets = {"all": str(tmp_path / "packed"), "held": {"path": str(tmp_path / "packed"), "splits": ["heldout"]}}
    run = run_of(tmp_path, sets)

    assert missing_test_sets(run) == []
    every, held = opened(run)

    assert every.folder == held.folder == tmp_path / "packed"
    assert len(every.utterances) == 12
    assert 0 < len(held.utterances) < 12
    assert {utterance.split for utterance in held.utterances} == {"heldout"}
    assert sorted(tones_of(run, every)) == list(range(12))
    assert hashes_of(tmp_path / "packed") == before
    assert not (tmp_path / "run").exists()


def test_packed_folder_with_a_source_is_packed_anew_as_that(tmp_path: Path) -> None:
    pack_tones(make_recordings(tmp_path / "tones", 5), tmp_path / "packed", holdout=0.0)
    run = run_of(tmp_path, {"a": {"path": str(tmp_path / "packed"), "source": "webdataset"}})

    (found,) = opened(run)

    assert found.folder == tmp_path / "run/score/sets/a"
    assert sorted(tones_of(run, found)) == list(range(5))
    assert {utterance.reference for utterance in found.utterances} == {f"tone số {number}" for number in range(5)}


def test_language_fills_in_what_a_packed_folder_does_not_know(tmp_path: Path) -> None:
    make_set(tmp_path / "a", {"text": "x"}, {"text": "y", "lang": "en"})
    packed = opened(run_of(tmp_path, {"a": str(tmp_path / "a/m.jsonl")}))[0].folder

    (found,) = open_test_sets(run_of(tmp_path, {"a": {"path": str(packed), "language": "vi"}}))
    (unknown,) = open_test_sets(run_of(tmp_path, {"a": str(packed)}))

    assert sorted(map(told, found.utterances)) == [("0", "Vietnamese", None, "x"), ("1", "English", None, "y")]
    assert sorted(map(told, unknown.utterances)) == [("0", None, None, "x"), ("1", "English", None, "y")]
    assert found.fingerprint != unknown.fingerprint


def test_rejected_utterances_are_counted_and_too_many_stop(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "a", *({"text": "x"} for _ in range(4)))
    (tmp_path / "a/1.wav").write_bytes(b"RIFF")

    strict = run_of(tmp_path, {"a": str(manifest)}, pack={"max_rejected_share": 0.2})
    with pytest.raises(AudioError, match=r"^score\.sets\.a: pack\.max_rejected_share must cover .* 0\.2 and 1 of 4 "):
        prepare_test_sets(strict)
    (found,) = opened(run_of(tmp_path, {"a": str(manifest)}, pack={"max_rejected_share": 0.3}))

    assert (found.num_in_all, found.num_rejected) == (3, 1)


def test_own_set_counts_what_pack_rejected_of_its_splits(tmp_path: Path) -> None:
    recordings = make_recordings(tmp_path / "tones", 12)
    packed = tmp_path / "run/pack"
    pack_tones(recordings, packed)
    with (packed / "rejected.jsonl").open("a") as file:
        for split in ("heldout", "train", "train", "exclude"):
            file.write(json.dumps({"key": "k", "split": split, "reason": "too short: x"}) + "\n")

    (held,) = open_test_sets(run_of(tmp_path, {}, splits=["heldout"]))
    (both,) = open_test_sets(run_of(tmp_path, {}, splits=["train", "heldout"]))

    assert (held.num_rejected, both.num_rejected) == (1, 3)


ROWS = [{"text": "x", "split": "dev"}, {"text": "y", "split": "test"}, {"text": "z"}]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"path": "none"},
            SourceError,
            r"^score\.sets\.a\.path must be a corpus or a packed folder, got 'none' \(no",
        ),
        ({"path": "SET", "splits": ["tset"]}, ConfigError, r"^score\.sets\.a\.splits must .*\(dev, test\), got tset;"),
        ({"path": "SET", "splits": []}, ConfigError, r"^score\.sets\.a\.splits must be .*\(dev, test\), got \[\];"),
        (
            {"path": "SET", "language": "elvish"},
            SourceError,
            r"^score\.sets\.a\.language: language must be .*elvish'",
        ),
        (
            {"path": "SET", "source": "kaldi"},
            SourceError,
            r"^score\.sets\.a: '.*m\.jsonl' must be readable, got 'Not a",
        ),
    ],
)
def test_set_that_cannot_be_packed_is_refused_by_its_setting(
    tmp_path: Path, settings: dict[str, Any], kind: type[QadError], message: str
) -> None:
    manifest = make_set(tmp_path / "a", *ROWS)
    place = {"none": "none", "SET": str(manifest)}[settings["path"]]
    run = run_of(tmp_path, {"a": {**settings, "path": place}})

    with pytest.raises(kind, match=message):
        prepare_test_sets(run)

    assert not (tmp_path / "run/score/sets/a/done.json").exists()


def test_kind_that_cannot_be_seen_is_asked_for_by_the_name_of_the_set(tmp_path: Path) -> None:
    write_tone(tmp_path / "mix/1.wav", 1)
    write_lines(tmp_path / "mix/train.parquet", "x")

    with pytest.raises(SourceError, match=r"^score\.sets\.a\.path must each be of one .*; set score\.sets\.a\.source$"):
        prepare_test_sets(run_of(tmp_path, {"a": str(tmp_path / "mix")}))


def test_common_voice_without_the_split_names_those_that_are_there(tmp_path: Path) -> None:
    make_common_voice(tmp_path / "vi")
    (tmp_path / "vi/test.tsv").unlink()

    with pytest.raises(ConfigError, match=r"^score\.sets\.common-voice-vi\.splits must be .*\(dev, train\), got test;"):
        prepare_test_sets(run_of(tmp_path, {"common-voice-vi": str(tmp_path)}))


@pytest.mark.parametrize("call", [missing_test_sets, prepare_test_sets, open_test_sets])
def test_name_like_that_of_a_known_set_is_refused_at_once(tmp_path: Path, call: Any) -> None:
    with pytest.raises(ConfigError, match=r"^score\.sets names must go on after fleurs- .*, got 'fleurs-sw'"):
        call(run_of(tmp_path, {"fleurs-sw": str(tmp_path)}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "a",
            {"splits": ["dev"]},
            r"^score\.sets\.a\.splits must be of train, heldout, test for a p.*, got dev;",
        ),
        ("a", {"splits": []}, r"^score\.sets\.a\.splits must be of train, heldout, test for a p.*, got \[\];"),
        ("a", {"splits": ["test"]}, r"^score\.sets\.a must name utterances, got none in .*packed of the splits test;"),
        ("a", {"language": "elvish"}, r"^score\.sets\.a: language must be one of .* got 'elvish'"),
        ("vivos-test", {}, r"^score\.sets\.vivos-test\.splits must say what .*\(heldout, train\), got none; a name"),
    ],
)
def test_packed_folder_that_does_not_have_it_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    pack_tones(make_recordings(tmp_path / "tones", 12), tmp_path / "packed")

    with pytest.raises((ConfigError, SourceError), match=message):
        open_test_sets(run_of(tmp_path, {name: {"path": str(tmp_path / "packed"), **changes}}))


def test_known_name_may_be_that_of_a_packed_folder_of_one_split(tmp_path: Path) -> None:
    pack_tones(make_recordings(tmp_path / "tones", 3), tmp_path / "packed", holdout=0.0)

    (found,) = open_test_sets(run_of(tmp_path, {"vivos-test": str(tmp_path / "packed")}))

    assert len(found.utterances) == 3


def test_sets_without_any_reference_or_utterance_are_refused(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "a", {"lang": "vi"}, {"lang": "vi"})
    pack_tones(make_recordings(tmp_path / "tones", 12), tmp_path / "run/pack")

    with pytest.raises(ShardError, match=r"^score\.sets\.a must name utterances with references, got 2 of .* none w"):
        opened(run_of(tmp_path, {"a": str(manifest)}))
    with pytest.raises(ConfigError, match=r"^score\.splits must name utterances, got none in .*k of the splits test"):
        open_test_sets(run_of(tmp_path, {}, splits=["test"]))
