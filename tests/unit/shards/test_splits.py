from collections import defaultdict

import pytest

from shards.columns import Columns
from shards.errors import ConfigError
from shards.schema import SPLITS, Recording
from shards.splits import assign_splits

NAMES = {"train": "train", "dev": "heldout", "test": "test"}


def recording(number: int, *, speaker: str | None, language: str | None = "English", split: str | None = None):
    return Recording(
        path=f"{number}.wav", key=f"k{number}", source="s", language=language, speaker=speaker, split=split
    )


def assign(recordings, *, holdout=0.1, holdout_by="speaker", seed=0):
    columns = Columns.of(Recording, recordings)
    places = assign_splits(columns, splits=NAMES, holdout=holdout, holdout_by=holdout_by, seed=seed)
    return [SPLITS[place] for place in places]


def test_names_of_the_source_are_mapped_and_not_set_aside_again():
    recordings = [recording(0, speaker="a", split="dev"), recording(1, speaker="b", split="test")]

    assert assign(recordings, holdout=0.9) == ["heldout", "test"]


def test_an_unknown_split_name_is_refused():
    with pytest.raises(
        ConfigError, match=r"pack\.splits must list every split.*'validation' on 1 recordings, first 'k0'"
    ):
        assign([recording(0, speaker="a", split="validation")])


def test_no_speaker_is_on_both_sides():
    recordings = [recording(i, speaker=f"s{i % 20}", language=("English", "German")[i % 3 == 0]) for i in range(600)]

    sides = defaultdict(set)
    for item, split in zip(recordings, assign(recordings), strict=True):
        sides[item.speaker].add(split)

    assert all(len(splits) == 1 for splits in sides.values())
    assert {"train", "heldout"} == set.union(*sides.values())


@pytest.mark.parametrize("holdout_by", ["speaker", "recording"])
def test_each_language_gives_about_its_share(holdout_by):
    recordings = [recording(i, speaker=f"s{i % 40}-{i % 2}", language=("English", "German")[i % 2]) for i in range(800)]

    splits = assign(recordings, holdout=0.1, holdout_by=holdout_by)

    for language in ("English", "German"):
        held = sum(s == "heldout" and r.language == language for r, s in zip(recordings, splits, strict=True))
        assert held == 40  # of 400; speakers have 20 recordings each


@pytest.mark.parametrize("seed", range(20))
def test_speakers_set_aside_in_one_language_count_in_the_next(seed):
    english = [recording(i, speaker=f"s{i % 20}") for i in range(200)]
    german = [recording(200 + i, speaker=f"s{i % 40}", language="German") for i in range(400)]

    splits = assign(english + german, seed=seed)

    sides = {(r.speaker, split) for r, split in zip(english + german, splits, strict=True)}
    assert len(sides) == 40  # nobody is on both sides, though German may take more of those who speak English too
    assert splits[:200].count("heldout") >= 20  # two speakers of ten recordings
    assert splits[200:].count("heldout") == 40  # the same two, and two more


def test_a_language_of_one_speaker_gives_recordings_of_that_one():
    splits = assign([recording(i, speaker="only") for i in range(50)], holdout=0.1)

    assert splits.count("heldout") == 5


@pytest.mark.parametrize("seed", range(50))
def test_the_only_speaker_of_a_language_is_not_set_aside_in_another_one(seed):
    arabic = [recording(i, speaker="s", language="Arabic") for i in range(100)]
    english = [recording(100 + i, speaker=f"e{i % 9}" if i % 10 else "s") for i in range(500)]

    splits = assign(arabic + english, seed=seed)

    assert splits[:100].count("heldout") == 10
    sides = {(r.speaker, split) for r, split in zip(english, splits[100:], strict=True)}
    assert ("s", "train") in sides and len(sides) == 10
    assert 25 <= splits[100:].count("heldout") <= 75


@pytest.mark.parametrize("seed", range(50))
def test_languages_that_share_speakers_all_keep_a_train_split(seed):
    spoken = {"Arabic": "xy", "English": "xyz", "French": "zy"}
    recordings = [
        recording(100 * n + i, speaker=speaker, language=language)
        for n, (language, speaker) in enumerate((language, s) for language, names in spoken.items() for s in names)
        for i in range(10)
    ]

    splits = assign(recordings, holdout=0.5, seed=seed)

    sides = {(r.speaker, split) for r, split in zip(recordings, splits, strict=True)}
    assert len(sides) == 3  # nobody is on both sides
    for language in spoken:
        assert {s for r, s in zip(recordings, splits, strict=True) if r.language == language} == {"train", "heldout"}


def test_a_language_whose_speakers_are_each_the_only_one_of_another_gives_recordings():
    recordings = [
        *(recording(i, speaker="a", language="Arabic") for i in range(10)),
        *(recording(10 + i, speaker="g", language="German") for i in range(10)),
        *(recording(20 + i, speaker="ag"[i % 2]) for i in range(20)),
    ]

    splits = assign(recordings)

    assert [splits[i:j].count("heldout") for i, j in ((0, 10), (10, 20), (20, 40))] == [1, 1, 2]


def test_two_speakers_give_the_smaller_one_however_small_the_share():
    recordings = [recording(i, speaker="big" if i < 80 else "small") for i in range(100)]

    assert assign(recordings, holdout=0.01) == ["train"] * 80 + ["heldout"] * 20


def test_train_is_never_left_empty():
    recordings = [recording(i, speaker=f"s{i}") for i in range(3)]

    assert assign(recordings, holdout=0.99).count("train") == 1


def test_a_single_recording_stays_in_train():
    assert assign([recording(0, speaker=None)]) == ["train"]


def test_nothing_is_set_aside_at_a_share_of_zero():
    assert set(assign([recording(i, speaker=None) for i in range(100)], holdout=0)) == {"train"}


def test_the_choice_depends_on_seed_and_names_not_on_order():
    recordings = [recording(i, speaker=f"s{i % 30}") for i in range(300)]

    forwards = dict(zip(recordings, assign(recordings), strict=True))
    backwards = dict(zip(recordings[::-1], assign(recordings[::-1]), strict=True))
    other = dict(zip(recordings, assign(recordings, seed=1), strict=True))

    assert forwards == backwards
    assert forwards != other
