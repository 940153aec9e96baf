"""Which utterances calibrate: shared out over languages, spread over durations."""

from collections import Counter
from pathlib import Path

import pytest

from qad_dist.config import RunConfig
from qad_dist.filters import FiltersConfig
from qad_dist.runtime.world import World
from qad_dist.stages import quantize
from qad_dist.stages.quantize import calibration_rows, share_out
from qad_dist.text.accept import judge
from shards.errors import ShardError, WorldError
from shards.index import read_index, read_utterances
from shards.labels import LabelHeader, label_path, write_labels
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, TRAIN, PseudoLabel, Recording, Utterance
from shards.verdicts import Judged, verdict_path, write_verdicts
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone

# Training utterances of each language; the unknown one is what the teacher says it is.
COUNTS = {"English": 12, "German": 5, "Thai": 2, None: 3}
DETECTED = "Korean"


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


def run_of(folder: Path, utterances: int = 1024) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(folder),
            "model": {"path": "unused"},
            "pack": {"inputs": ["unused"]},
            "quantize": {"calibration_utterances": utterances},
        }
    )


def label_of(utterance: Utterance, *, text: str = "x", ended_by: str = ENDED_BY_END_TOKEN) -> PseudoLabel:
    return PseudoLabel(
        key=utterance.key,
        token_ids=(7, 8),
        text=text,
        language=utterance.language or DETECTED,
        token_logprobs=(-0.1, -0.1),
        mean_logprob=-0.1,
        ended_by=ended_by,
        duration_seconds=utterance.duration_seconds,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run packed and labelled: each utterance of a language lasts 10 ms longer than the one before."""
    recordings = []
    for language, count in COUNTS.items():
        for number in range(count + 1):  # the last one is held out
            name = f"{language or 'unknown'}-{number}".lower()
            seconds = 0.2 + 0.01 * number
            recordings.append(
                Recording(
                    path=str(write_tone(tmp_path / "audio" / f"{name}.wav", number, seconds=seconds)),
                    key=name,
                    source="tones",
                    language=language,
                    split="dev" if number == count else "train",
                )
            )
    pack_tones(recordings, tmp_path / "run" / "pack", holdout=0, drop_duplicates=False)  # equal tones
    write_label_files(tmp_path / "run", {})
    return tmp_path / "run"


def write_label_files(folder: Path, special: dict[str, dict[str, str]]) -> None:
    """Label everything; ``special`` names what is different about a key's label."""
    utterances = read_utterances(folder / "pack")
    for entry in read_index(folder / "pack").shards:
        labels = [label_of(u, **special.get(u.key, {})) for u in utterances if u.shard == entry.name]
        header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
        path = label_path(folder / "label", entry.name)
        judged = Judged(shard=entry.name, labels_sha256=write_labels(path, header, labels), settings={})
        # The texts are no texts: what they say against themselves is not what this is about.
        filters = FiltersConfig.model_validate({name: {"action": "none"} for name in ("rate", "script")})
        verdicts = [judge(label, language=None, reference=None, filters=filters) for label in labels]
        write_verdicts(verdict_path(path), judged, verdicts)


def keys_of(run: RunConfig) -> list[str]:
    return [utterance.key for utterance, _ in calibration_rows(run)]


def test_all_training_utterances_calibrate_when_enough_are_wanted(folder: Path) -> None:
    keys = keys_of(run_of(folder))

    expected = {f"{language or 'unknown'}-{i}".lower() for language, count in COUNTS.items() for i in range(count)}
    assert len(keys) == len(expected)
    assert set(keys) == expected  # each once, nothing held out


def test_languages_share_the_calibration_set_evenly(folder: Path) -> None:
    """12 of 22: of the languages English, German, Korean (detected) and Thai the last can give only 2."""
    rows = calibration_rows(run_of(folder, 12))

    counts = Counter(utterance.language or label.language for utterance, label in rows)
    assert counts == {"English": 4, "German": 3, DETECTED: 3, "Thai": 2}


def test_shortest_and_longest_of_each_language_are_chosen_and_the_rest_at_equal_distances(folder: Path) -> None:
    keys = keys_of(run_of(folder, 12))

    # Durations rise with the number: 4 of 12 at the places 0, 3.67, 7.33 and 11; 3 of 5 at 0, 2 and 4.
    assert keys == [
        *("english-0", "english-4", "english-7", "english-11"),
        *("german-0", "german-2", "german-4"),
        *("unknown-0", "unknown-1", "unknown-2"),
        *("thai-0", "thai-1"),
    ]


def test_choice_is_the_same_every_time(folder: Path) -> None:
    assert keys_of(run_of(folder, 9)) == keys_of(run_of(folder, 9))


def test_labels_that_are_not_fit_for_use_do_not_calibrate(folder: Path) -> None:
    write_label_files(folder, {"german-0": {"text": " "}, "german-1": {"ended_by": ENDED_BY_LENGTH}})

    keys = keys_of(run_of(folder))

    assert len(keys) == sum(COUNTS.values()) - 2
    assert not {"german-0", "german-1"} & set(keys)


def test_labels_of_another_pack_are_refused(folder: Path) -> None:
    shard = next(u.shard for u in read_utterances(folder / "pack") if u.split == TRAIN)
    header = LabelHeader(shard=shard, shard_sha256="0" * 64, teacher="t", settings={})
    write_labels(label_path(folder / "label", shard), header, [])

    with pytest.raises(ShardError, match=r"must label the shard that is in the index, got another one; label again"):
        calibration_rows(run_of(folder))


def test_only_one_rank_reads_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get the rows that it chose; on this rank, as on them, nothing is read."""
    chosen: list[object] = [object(), object()]
    monkeypatch.setattr(quantize, "require_stage", lambda *_: None)
    monkeypatch.setattr(quantize, "calibration_rows", lambda _: pytest.fail("read the labels"))
    monkeypatch.setattr(quantize, "run_on_main", lambda _: chosen)

    def reached(_: World, num_utterances: int, *, stage: str) -> None:
        raise WorldError(f"{stage} has {num_utterances}")

    monkeypatch.setattr(quantize, "check_enough_work", reached)

    with pytest.raises(WorldError, match="quantize has 2"):
        quantize.run(run_of(tmp_path))
