"""Which utterances calibrate: languages and durations balanced, silence and long audio in, a part to search on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qad_dist.calibration_set import CalibrationSet, choose_calibration, is_silence, search_part, share_out
from qad_dist.config import RunConfig
from qad_dist.config.filters import FiltersConfig
from qad_dist.text.accept import judge
from shards.errors import ConfigError, ShardError
from shards.index import read_index, read_utterances
from shards.labelled import Answer
from shards.labels import LabelHeader, label_path, read_label_file, second_path, write_labels
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, TRAIN, UNREADABLE, PseudoLabel, Recording
from shards.verdicts import Judged, verdict_path, write_verdicts
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone

# Training utterances of each language; the unknown one is what the teacher says it is.
COUNTS = {"English": 12, "German": 5, "Thai": 2, None: 3}
DETECTED = "Korean"

# Of a larger corpus: seconds of its utterances. Nobody speaks in the French ones.
SHORT = [0.2 + 0.01 * number for number in range(70)]
MANY = {
    "English": [*SHORT, 19.9, 30.1],
    "German": [*SHORT, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0],
    "French": [0.5 + 0.1 * number for number in range(6)],
}
SILENT = {"text": "", "language": None}

# The texts are no texts: what they say against themselves is not what this is about.
FILTERS = FiltersConfig.model_validate({name: {"action": "none"} for name in ("rate", "script")})
Special = Mapping[str, Mapping[str, Any]]


def run_of(folder: Path, utterances: int = 1024, *, sources: Sequence[str] = (), **label: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(folder),
            "model": {"path": "unused"},
            "pack": {"inputs": ["unused"]},
            "label": label,
            "quantize": {"calibration_utterances": utterances, "calibration_sources": sources},
        }
    )


def label_of(key: str, language: str | None, duration_seconds: float, /, **special: Any) -> PseudoLabel:
    usual: dict[str, Any] = {
        "key": key,
        "token_ids": (7, 8),
        "text": "x",
        "language": language or DETECTED,
        "token_logprobs": (-0.1, -0.1),
        "mean_logprob": -0.1,
        "ended_by": ENDED_BY_END_TOKEN,
        "duration_seconds": duration_seconds,
    }
    return PseudoLabel(**(usual | special))


def write_label_files(folder: Path, special: Special, filters: FiltersConfig = FILTERS) -> None:
    """Label everything; ``special`` names what is different about a key's label."""
    utterances = read_utterances(folder / "pack")
    for entry in read_index(folder / "pack").shards:
        labels = [
            label_of(u.key, u.language, u.duration_seconds, **special.get(u.key, {}))
            for u in utterances
            if u.shard == entry.name
        ]
        header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
        write_judged(label_path(folder / "label", entry.name), header, labels, filters)


def write_judged(path: Path, header: LabelHeader, labels: Sequence[PseudoLabel], filters: FiltersConfig) -> None:
    judged = Judged(shard=header.shard, labels_sha256=write_labels(path, header, labels), settings={})
    verdicts = [judge(label, language=None, reference=None, filters=filters) for label in labels]
    write_verdicts(verdict_path(path), judged, verdicts)


def pack(folder: Path, seconds_of: Mapping[str | None, Sequence[float]]) -> Path:
    """Shards of a tone for each of these durations, and of one held-out one for each language."""
    recordings = []
    for language, durations in seconds_of.items():
        for number, seconds in enumerate([*durations, 0.9]):
            name = f"{language or 'unknown'}-{number}".lower()
            recordings.append(
                Recording(
                    path=str(write_tone(folder / "audio" / f"{name}.wav", number, seconds=seconds)),
                    key=name,
                    source=f"set-{language}",
                    language=language,
                    split="dev" if number == len(durations) else "train",
                )
            )
    pack_tones(
        recordings,
        folder / "pack",
        holdout=0,
        drop_duplicates=False,  # equal tones
        max_audio_seconds=40.0,
        utterances_per_shard=32,
    )
    return folder / "pack"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each utterance of a language lasts 10 ms longer than the one before."""
    return pack(
        tmp_path_factory.mktemp("packed"),
        {language: [0.2 + 0.01 * number for number in range(count)] for language, count in COUNTS.items()},
    )


@pytest.fixture(scope="module")
def packed_many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("many"), MANY)


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A small run, labelled: everything has a text."""
    (tmp_path / "pack").symlink_to(packed)
    write_label_files(tmp_path, {})
    return tmp_path


@pytest.fixture
def many(packed_many: Path, tmp_path: Path) -> Path:
    """A larger run, labelled: the French utterances are silence."""
    (tmp_path / "pack").symlink_to(packed_many)
    write_label_files(tmp_path, silent_french())
    return tmp_path


def silent_french(count: int = len(MANY["French"])) -> Special:
    return {f"french-{number}": SILENT for number in range(count)}


def keys_of(chosen: CalibrationSet) -> list[str]:
    return [utterance.key for utterance, _ in chosen.rows]


def keys_where(chosen: CalibrationSet, is_meant: Any) -> list[str]:
    return [key for key, meant in zip(keys_of(chosen), is_meant, strict=True) if meant]


def seconds_of(chosen: CalibrationSet) -> list[float]:
    return chosen.rows.utterances.numbers("duration_seconds").tolist()


@pytest.mark.parametrize(
    ("total", "available", "expected"),
    [
        (12, [100, 100, 100], [4, 4, 4]),
        (13, [100, 100, 100], [5, 4, 4]),
        (2, [100, 100, 100], [1, 1, 0]),
        (12, [100, 1, 100], [6, 1, 5]),
        (10, [2, 3, 100], [2, 3, 5]),
        (1000, [2, 3, 4], [2, 3, 4]),
        (5, [0, 7], [0, 5]),
        (0, [4, 4], [0, 0]),
        (3, [], []),
    ],
)
def test_share_out_by_hand(total: int, available: list[int], expected: list[int]) -> None:
    assert share_out(total, available) == expected


@pytest.mark.parametrize("total", [0, 1, 7, 30, 99, 1024])
@pytest.mark.parametrize("available", [[1], [3, 50, 7, 20], [1000] * 30, [0, 0, 9]])
def test_share_out_gives_all_that_there_is_and_is_as_even_as_can_be(total: int, available: list[int]) -> None:
    quotas = share_out(total, available)

    assert sum(quotas) == min(total, sum(available))
    assert all(0 <= quota <= size for quota, size in zip(quotas, available, strict=True))
    # A group that could give more has no less than any other, but for the remainder of a division.
    with_more = [quota for quota, size in zip(quotas, available, strict=True) if quota < size]
    assert not with_more or max(quotas) - min(with_more) <= 1


@pytest.mark.parametrize(
    ("total", "at_least", "expected"),
    [(12, [0, 6, 0], [3, 6, 3]), (6, [0, 6, 0], [0, 6, 0]), (12, [1, 1, 1], [4, 4, 4]), (9, [5, 0, 0], [5, 2, 2])],
)
def test_what_a_group_gives_in_any_case_counts_as_its_share(
    total: int, at_least: list[int], expected: list[int]
) -> None:
    assert share_out(total, [9, 9, 9], at_least=at_least) == expected


def test_only_named_sources_calibrate_their_silence_among_it(many: Path) -> None:
    chosen = choose_calibration(run_of(many, sources=["set-German", "set-French"]))

    assert Counter(key.split("-")[0] for key in keys_of(chosen)) == {"german": 76, "french": 2}
    assert {key.split("-")[0] for key in keys_where(chosen, chosen.is_silent)} == {"french"}
    with pytest.raises(ConfigError, match=r"quantize\.calibration_sources must be sources .*set-English.*, got phone"):
        choose_calibration(run_of(many, sources=["phone"]))


def test_all_training_utterances_calibrate_when_enough_are_wanted(folder: Path) -> None:
    keys = keys_of(choose_calibration(run_of(folder)))

    expected = {f"{language or 'unknown'}-{i}".lower() for language, count in COUNTS.items() for i in range(count)}
    assert len(keys) == len(expected)
    assert set(keys) == expected  # each once, nothing held out


def test_languages_share_the_calibration_set_evenly(folder: Path) -> None:
    """12 of 22: of the languages English, German, Korean (detected) and Thai the last can give only 2."""
    chosen = choose_calibration(run_of(folder, 12))

    counts = Counter(utterance.language or response.language for utterance, response in chosen.rows)
    assert counts == {"English": 4, "German": 3, DETECTED: 3, "Thai": 2}
    assert chosen.num_languages == 4


def test_shortest_and_longest_of_each_language_are_chosen_and_the_rest_at_equal_distances(folder: Path) -> None:
    keys = keys_of(choose_calibration(run_of(folder, 12)))

    # Durations rise with the number: 4 of 12 at the places 0, 3.67, 7.33 and 11; 3 of 5 at 0, 2 and 4.
    assert keys == [
        *("english-0", "english-4", "english-7", "english-11"),
        *("german-0", "german-2", "german-4"),
        *("unknown-0", "unknown-1", "unknown-2"),
        *("thai-0", "thai-1"),
    ]


def test_each_row_comes_with_the_response_that_the_teacher_gave_to_it(many: Path) -> None:
    numbered = {f"german-{number}": {"token_ids": (number, 8)} for number in range(76)}
    write_label_files(many, {**silent_french(), **numbered})

    chosen = choose_calibration(run_of(many, 64))

    german = [(u.key, r.token_ids.tolist()) for u, r in chosen.rows if u.language == "German"]
    assert german == [(key, list(numbered[key]["token_ids"])) for key, _ in german]
    assert len(german) == 31


def test_choice_is_the_same_every_time(many: Path) -> None:
    one, other = (choose_calibration(run_of(many, 40)) for _ in range(2))

    assert keys_of(one) == keys_of(other)
    assert one.is_search.tolist() == other.is_search.tolist()


def test_labels_that_are_not_fit_for_use_do_not_calibrate(folder: Path) -> None:
    write_label_files(folder, {"german-0": {"text": " "}, "german-1": {"ended_by": ENDED_BY_LENGTH}})

    keys = keys_of(choose_calibration(run_of(folder)))

    assert len(keys) == sum(COUNTS.values()) - 2
    assert not {"german-0", "german-1"} & set(keys)


def test_silence_calibrates_although_the_filter_drops_it(many: Path) -> None:
    """At most 1 in 32 of 64: the shortest and the longest of 6."""
    chosen = choose_calibration(run_of(many, 64))

    assert keys_where(chosen, chosen.is_silent) == ["french-0", "french-5"]
    assert keys_of(chosen)[-2:] == ["french-0", "french-5"]
    assert len(chosen.rows) == 64
    assert chosen.num_silent == 2
    assert chosen.num_languages == 2  # nobody speaks French


def test_silence_that_no_filter_drops_is_no_more_of_the_set(many: Path) -> None:
    filters = FILTERS.model_copy(update={"no_text": FILTERS.no_text.model_copy(update={"action": "none"})})
    write_label_files(many, silent_french(), filters)

    chosen = choose_calibration(run_of(many, 64))

    assert [key for key in keys_of(chosen) if key.startswith("french")] == ["french-0", "french-5"]
    assert chosen.num_silent == 2


def test_a_small_set_has_one_silent_utterance_and_all_that_have_a_text(folder: Path) -> None:
    write_label_files(folder, {f"english-{number}": SILENT for number in range(4)})

    chosen = choose_calibration(run_of(folder))

    assert keys_where(chosen, chosen.is_silent) == ["english-0"]
    assert len(chosen.rows) == sum(COUNTS.values()) - 4 + 1


def test_a_set_of_one_utterance_is_the_longest_of_the_long_ones(many: Path) -> None:
    chosen = choose_calibration(run_of(many, 1))

    assert not chosen.is_silent.any()
    assert seconds_of(chosen) == [30.0]


@pytest.mark.parametrize(
    ("special", "filters", "expected"),
    [
        ({}, {}, True),
        ({"prompt_language": "French"}, {}, True),
        ({}, {"no_text": {"action": "none"}}, True),
        ({}, {"no_text": {"action": "kl_only"}}, True),
        ({"text": "x"}, {}, False),  # a text in no language
        ({"language": "French"}, {}, False),  # a language without a text
        ({"ended_by": ENDED_BY_LENGTH}, {}, False),
        ({"ended_by": ENDED_BY_LENGTH}, {"runaway": {"action": "none"}}, False),
        ({"mean_logprob": -9.0}, {}, False),  # silence, but unsure
        ({}, {"reference": {"action": "drop"}}, False),  # somebody has heard a word
    ],
)
def test_silence_is_an_answer_without_text_and_language_that_nothing_else_speaks_against(
    special: dict[str, Any], filters: dict[str, Any], expected: bool
) -> None:
    label = label_of("one", None, 2.0, **{**SILENT, **special})
    verdict = judge(label, language=None, reference="word", filters=FiltersConfig.model_validate(filters))

    assert is_silence(Answer(label, verdict, 0, False)) is expected


def test_what_cannot_be_read_is_no_silence(many: Path) -> None:
    damaged = {"token_ids": (), "token_logprobs": (), "mean_logprob": None, "error": "cut", "ended_by": UNREADABLE}
    write_label_files(many, {key: {**SILENT, **damaged} for key in silent_french()})

    chosen = choose_calibration(run_of(many))

    assert chosen.num_silent == 0
    assert chosen.missing_silent == (72 + 76) // 32


def test_a_text_of_the_second_pass_stands_for_silence_of_the_first(many: Path) -> None:
    for entry in read_index(many / "pack").shards:
        first = read_label_file(label_path(many / "label", entry.name))
        again = [replace(one, text="x", language="French") for one in first.labels if one.key == "french-0"]
        header = replace(first.header, first_sha256=first.sha256)
        write_judged(second_path(many / "label", entry.name), header, again, FILTERS)

    chosen = choose_calibration(run_of(many, 64, second_pass="manifest"))

    assert keys_where(chosen, chosen.is_silent) == ["french-1", "french-5"]
    assert "french-0" in keys_where(chosen, ~chosen.is_silent)
    assert chosen.num_languages == 3


def test_one_in_sixteen_at_least_is_long(many: Path) -> None:
    """6 of 148 last 20 to 30 s, all of them German: by the strata alone 3 would be chosen."""
    chosen = choose_calibration(run_of(many, 64))

    long = [seconds for seconds in seconds_of(chosen) if 20.0 <= seconds <= 30.0]
    assert long == [20.0, 24.0, 26.0, 30.0]  # at the places 5, 3.33, 1.67 and 0 from above
    assert chosen.num_long == 4
    assert chosen.missing_long == 0


def test_long_utterances_replace_others_of_their_language_alone(many: Path) -> None:
    chosen = choose_calibration(run_of(many, 64))

    german = [u.duration_seconds for u, _ in chosen.rows if u.language == "German"]
    english = [u.duration_seconds for u, _ in chosen.rows if u.language == "English"]
    assert len(german) == len(english) == 31
    assert german == sorted(german)
    assert german[:2] == [0.2, pytest.approx(0.2 + 0.01 * round(69 / 26))]  # 27 of the 70 short ones
    assert english[0] == 0.2
    assert english[-1] == pytest.approx(30.1)  # the longest, although it is none of the long ones


def test_all_long_utterances_calibrate_where_there_are_fewer_than_wanted(many: Path) -> None:
    short = {f"german-{number}": {"ended_by": ENDED_BY_LENGTH} for number in range(72, 76)}
    write_label_files(many, {**silent_french(), **short})

    chosen = choose_calibration(run_of(many, 100))

    assert [seconds for seconds in seconds_of(chosen) if 20.0 <= seconds <= 30.0] == [20.0, 22.0]
    assert chosen.num_long == 2
    assert chosen.missing_long == 100 // 16 - 2


def test_silence_is_not_counted_as_long(many: Path) -> None:
    write_label_files(many, {**silent_french(), **{f"german-{number}": SILENT for number in range(70, 76)}})

    chosen = choose_calibration(run_of(many, 64))

    assert chosen.num_silent == 2
    assert keys_where(chosen, chosen.is_silent) == ["french-0", "german-75"]
    assert chosen.num_long == 0
    assert chosen.missing_long == 4


def test_data_without_silence_and_long_audio_lack_the_whole_quota(folder: Path) -> None:
    chosen = choose_calibration(run_of(folder))

    assert (chosen.num_silent, chosen.num_long) == (0, 0)
    assert (chosen.missing_silent, chosen.missing_long) == (1, 1)


def test_every_language_and_all_durations_are_in_both_parts(many: Path) -> None:
    chosen = choose_calibration(run_of(many, 128))
    search, others = (chosen.rows.take(places) for places in (chosen.search_places, chosen.other_places))

    assert len(search) == 16
    assert sorted([*chosen.search_places, *chosen.other_places]) == list(range(128))
    for part in (search, others):
        languages = [utterance.language for utterance, _ in part]
        assert {"English", "German"} <= set(languages)
        seconds = part.utterances.numbers("duration_seconds")
        assert seconds.min() < 0.3
        assert seconds.max() > 19


def test_long_clips_are_made_of_what_is_neither_searched_on_nor_silent(many: Path) -> None:
    chosen = choose_calibration(run_of(many, 64))

    joinable = [utterance.key for utterance, _ in chosen.joinable]
    searched = set(keys_where(chosen, chosen.is_search))
    assert joinable == [key for key in keys_of(chosen) if key not in searched and not key.startswith("french")]
    assert 64 - 8 - 2 <= len(joinable) < 64 - 8


def test_a_single_utterance_is_in_both_parts(folder: Path) -> None:
    chosen = choose_calibration(run_of(folder, 1))

    assert chosen.search_places.tolist() == chosen.other_places.tolist() == [0]
    assert len(chosen.joinable) == 1


def test_one_of_two_utterances_is_searched_on_and_the_spoken_one_calibrates(many: Path) -> None:
    chosen = choose_calibration(run_of(many, 2))

    assert chosen.is_silent.tolist() == chosen.is_search.tolist() == [False, True]
    assert len(chosen.joinable) == 1


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (1, 0.125, [0]),
        (2, 0.125, [1]),
        (16, 0.125, [4, 12]),
        (24, 0.125, [4, 12, 20]),
        (10, 0.3, [1, 5, 8]),
        (4, 0.9, [0, 2, 3]),  # never all
    ],
)
def test_search_part_lies_at_equal_distances(count: int, share: float, expected: list[int]) -> None:
    assert np.flatnonzero(search_part(count, share=share)).tolist() == expected


def test_labels_of_another_pack_are_refused(folder: Path) -> None:
    shard = next(u.shard for u in read_utterances(folder / "pack") if u.split == TRAIN)
    header = LabelHeader(shard=shard, shard_sha256="0" * 64, teacher="t", settings={})
    write_labels(label_path(folder / "label", shard), header, [])

    with pytest.raises(ShardError, match=r"must label the shard that is in the index, got another one; label again"):
        choose_calibration(run_of(folder))


def test_labels_of_silence_alone_are_refused(folder: Path) -> None:
    keys = [f"{language or 'unknown'}-{number}".lower() for language in COUNTS for number in range(12)]
    write_label_files(folder, {**dict.fromkeys(keys, SILENT), "english-0": {"ended_by": ENDED_BY_LENGTH}})

    with pytest.raises(ShardError, match=r"with a text of the split 'train', got 21 of silence.*\{'runaway': 1\}"):
        choose_calibration(run_of(folder))


def test_labels_of_which_none_is_usable_are_refused(folder: Path) -> None:
    keys = [f"{language or 'unknown'}-{number}".lower() for language in COUNTS for number in range(12)]
    write_label_files(folder, {key: {"ended_by": ENDED_BY_LENGTH} for key in keys})

    with pytest.raises(ShardError, match=r"must hold usable labels of the split 'train', got 0 \(.*'runaway': 22"):
        choose_calibration(run_of(folder))
