"""Names of test sets, and where the folders lie that they mean."""

from pathlib import Path

import pytest

from shards.errors import ConfigError, SourceError
from shards.known_sets import begins_as_known, find_known, known_set
from shards.places import Place


def lay(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(name: str, path: Path) -> str:
    known = known_set(name)
    assert known is not None
    return find_known(known, Place.of(str(path)), setting="score.sets.x.path").url


@pytest.mark.parametrize(
    ("name", "source", "language", "splits"),
    [
        ("librispeech-dev-clean", "librispeech", "English", None),
        ("librispeech-dev-other", "librispeech", "English", None),
        ("librispeech-test-clean", "librispeech", "English", None),
        ("librispeech-test-other", "librispeech", "English", None),
        ("librispeech-dev-clean-2", "librispeech", "English", None),
        ("vivos-test", "vivos", "Vietnamese", None),
        ("fleurs-vi", "fleurs", "Vietnamese", ("test",)),
        ("fleurs-vi_vn", "fleurs", "Vietnamese", ("test",)),
        ("fleurs-cmn_hans_cn", "fleurs", "Chinese", ("test",)),
        ("fleurs-yue", "fleurs", "Cantonese", ("test",)),
        ("common-voice-de", "common_voice", "German", ("test",)),
        ("common-voice-zh-hk", "common_voice", "Cantonese", ("test",)),
        ("common-voice-zh-tw", "common_voice", "Chinese", ("test",)),
    ],
)
def test_name_says_source_language_and_splits(name: str, source: str, language: str, splits: tuple[str, ...]) -> None:
    known = known_set(name)

    assert known is not None
    assert (known.source, known.language, known.splits) == (source, language, splits)
    assert known_set(name, source=source) == known


def test_other_name_and_other_source_say_nothing() -> None:
    assert known_set("my-calls") is None
    assert known_set("librispeech-test-clean", source="parquet") is None
    assert known_set("fleurs-mix", source="nemo") is None
    assert (begins_as_known("fleurs-mix"), begins_as_known("my-fleurs-vi")) == (True, False)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("librispeech-train-clean-5", "one of dev-clean, dev-other, test-clean, test-other, dev-clean-2"),
        ("librispeech-clean", "one of dev-clean, dev-other, test-clean, test-other, dev-clean-2"),
        ("vivos-train", "test"),
        ("fleurs-sw", "the code of one of the model's languages"),
        ("common-voice-all", "the code of one of the model's languages"),
    ],
)
def test_name_that_only_begins_as_a_known_one_is_refused(name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"^score\.sets names must go on after .* with {rule}, got '{name}'; mend"):
        known_set(name)


@pytest.mark.parametrize("below", ["", "LibriSpeech", "LibriSpeech/dev-clean-2"])
@pytest.mark.parametrize("around", ["", "mini_librispeech/", "dev-clean-2/"])
def test_librispeech_split_is_found_wherever_the_archive_was_unpacked(tmp_path: Path, around: str, below: str) -> None:
    tree = f"{around}LibriSpeech/"
    lay(
        tmp_path,
        *(f"{tree}{split}/84/121/84-121.trans.txt" for split in ("dev-clean-2", "dev-clean", "train-clean-5")),
        *(f"{tree}SPEAKERS.TXT", "other/LibriSpeech/readme", "dev-clean-2.tar.gz"),
    )

    path = tmp_path / around / below if below else tmp_path
    assert found("librispeech-dev-clean-2", path) == str(tmp_path / tree / "dev-clean-2")


@pytest.mark.parametrize("below", [".", "vivos", "vivos/test"])
def test_test_split_of_vivos_is_found_beside_its_training_split(tmp_path: Path, below: str) -> None:
    for split in ("train", "test"):
        lay(tmp_path, f"vivos/{split}/prompts.txt", f"vivos/{split}/waves/A/A_1.wav")

    assert found("vivos-test", tmp_path / below) == str(tmp_path / "vivos/test")


def test_folder_that_is_only_called_like_the_set_is_looked_into(tmp_path: Path) -> None:
    lay(tmp_path / "test", "test/prompts.txt", "test/waves/A/A_1.wav")
    for locale in ("de", "it"):
        lay(tmp_path / "it", f"{locale}/test.tsv", f"{locale}/clips/1.mp3")

    assert found("vivos-test", tmp_path / "test") == str(tmp_path / "test/test")
    assert found("common-voice-it", tmp_path / "it") == str(tmp_path / "it/it")


@pytest.mark.parametrize("below", [".", "fleurs", "fleurs/data", "fleurs/data/cmn_hans_cn"])
@pytest.mark.parametrize("code", ["zh", "cmn", "chinese", "cmn_hans_cn", "cmn-hans-cn"])
def test_language_of_fleurs_is_found_by_any_name_of_it(tmp_path: Path, below: str, code: str) -> None:
    for language in ("cmn_hans_cn", "yue_hant_hk", "en_us"):
        lay(tmp_path, f"fleurs/data/{language}/test.tsv", f"fleurs/data/{language}/audio/test/1.wav")

    assert found(f"fleurs-{code}", tmp_path / below) == str(tmp_path / "fleurs/data/cmn_hans_cn")


@pytest.mark.parametrize("below", [".", "cv", "cv/cv-corpus-17.0-2024-03-15", "cv/cv-corpus-17.0-2024-03-15/zh-CN"])
def test_locale_of_common_voice_goes_before_others_of_its_language(tmp_path: Path, below: str) -> None:
    tree = "cv/cv-corpus-17.0-2024-03-15"
    for locale in ("zh-CN", "zh-TW", "de"):
        lay(tmp_path, f"{tree}/{locale}/test.tsv", f"{tree}/{locale}/clips/1.mp3")

    assert found("common-voice-zh-cn", tmp_path / below) == str(tmp_path / tree / "zh-CN")


def test_folder_that_links_lead_to_as_well_is_one(tmp_path: Path) -> None:
    lay(tmp_path, "LibriSpeech/dev-clean/84/121/84-121.trans.txt")
    (tmp_path / "librispeech").symlink_to("LibriSpeech")
    (tmp_path / "LibriSpeech/LibriSpeech").symlink_to(".")

    assert Path(found("librispeech-dev-clean", tmp_path)).resolve() == tmp_path / "LibriSpeech/dev-clean"


def test_folders_are_looked_into_three_levels_down(tmp_path: Path) -> None:
    lay(tmp_path, "vivos/vivos/vivos/test/prompts.txt", "vivos/vivos/vivos/test/waves/A/A_1.wav")

    assert found("vivos-test", tmp_path / "vivos") == str(tmp_path / "vivos/vivos/vivos/test")
    with pytest.raises(SourceError, match="must hold the folder of test of vivos"):
        found("vivos-test", tmp_path)


def test_language_in_two_folders_is_refused_with_both(tmp_path: Path) -> None:
    for locale in ("zh-CN", "zh-TW"):
        lay(tmp_path, f"{locale}/test.tsv", f"{locale}/clips/1.mp3")

    with pytest.raises(SourceError, match=r"x\.path must hold zh of common_voice once, got .*zh-CN and .*zh-TW; name"):
        found("common-voice-zh", tmp_path)


def test_another_language_or_split_is_not_taken_for_the_one_that_is_missing(tmp_path: Path) -> None:
    lay(tmp_path / "fr", "test.tsv", "clips/1.mp3")
    lay(tmp_path / "LibriSpeech", "dev-clean/84/121/84-121.trans.txt")

    with pytest.raises(SourceError, match=r"must hold the folder of de of common_voice, or be it, got .*/fr' without"):
        found("common-voice-de", tmp_path / "fr")
    with pytest.raises(
        SourceError, match=r"must hold the folder of dev-clean-2 of librispeech, or be it, got .*dev-cl"
    ):
        found("librispeech-dev-clean-2", tmp_path / "LibriSpeech/dev-clean")


def test_archive_that_is_still_packed_and_a_path_to_nothing_are_told_apart(tmp_path: Path) -> None:
    lay(tmp_path, "dev-clean-2.tar.gz")

    with pytest.raises(SourceError, match=r"^score\.sets\.x\.path must be a folder, got .*gz' \(a file\); unpack"):
        found("librispeech-dev-clean-2", tmp_path / "dev-clean-2.tar.gz")
    with pytest.raises(SourceError, match=r"must be a folder, got .*/none' \(nothing at that path\)"):
        found("vivos-test", tmp_path / "none")
