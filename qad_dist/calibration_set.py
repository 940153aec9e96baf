"""Which labelled utterances calibrate: languages take turns, all durations, silence and long audio among them.

Pure but for the reading of the labels: equal labels give the same set, on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qad_dist.asr.dataset import languages_of
from qad_dist.asr.made_clips import LONG_SECONDS
from qad_dist.config import RunConfig
from qad_dist.labelling import read_used_labels
from qad_dist.text.accept import NO_TEXT
from shards.errors import ShardError
from shards.labelled import Answer, LabelledTable
from shards.schema import ENDED_BY_END_TOKEN, TRAIN
from shards.verdicts import NOTHING

# Of the set: enough for extremes that only such audio causes, too few to shift what is usual.
_ONE_SILENT_IN, _ONE_LONG_IN = 32, 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSet:
    """Utterances with the teacher's responses, in the order of their strata.

    Those with a text come first, by language and then by duration; silence, by duration, is behind them.
    """

    rows: LabelledTable
    is_search: npt.NDArray[np.bool_]
    """``[len(rows)]``: which of them alpha and clipping are chosen on; the others calibrate."""
    is_silent: npt.NDArray[np.bool_]
    """``[len(rows)]``: which of them the teacher has answered with no text and no language."""
    num_long: int
    """Utterances with text that last as :data:`~qad_dist.asr.made_clips.LONG_SECONDS` says."""
    num_languages: int
    """Strata of utterances with text; those of which nobody knows the language are one."""

    @property
    def num_silent(self) -> int:
        """Utterances without text."""
        return int(self.is_silent.sum())

    @property
    def missing_silent(self) -> int:
        """Silent utterances that the data lacks: at least one in 32 are wanted."""
        return max(0, _quota(len(self.rows), _ONE_SILENT_IN) - self.num_silent)

    @property
    def missing_long(self) -> int:
        """Long utterances that the data lacks: at least one in 16 are wanted."""
        return max(0, _quota(len(self.rows), _ONE_LONG_IN) - self.num_long)

    @property
    def search_places(self) -> npt.NDArray[np.int64]:
        """Rows to search on, in order."""
        return np.flatnonzero(self.is_search)

    @property
    def other_places(self) -> npt.NDArray[np.int64]:
        """All other rows, in order; of a set of one utterance that one, which is then in both parts."""
        return np.flatnonzero(~self.is_search) if len(self.rows) > 1 else np.zeros(1, np.int64)

    @property
    def joinable(self) -> LabelledTable:
        """Those of the others that are not silent, one at least: what made clips of the same part can consist of."""
        places = self.other_places
        return self.rows.take(places[~self.is_silent[places]])


def choose_calibration(run: RunConfig) -> CalibrationSet:
    """``quantize.calibration_utterances`` of the labelled training split, or all that there are.

    Languages take turns; within a language the utterances are sorted by duration and taken at equal distances, so that
    the shortest and the longest are among them. One in 16 at least are long, where there are so many: a language whose
    turn gives too few of its share of them takes its long and its other utterances apart. One in 32 at most, but at
    least one, are silence, which training leaves out (``label.filters.no_text``): spread over durations, too.

    Raises:
        ConfigError: ``quantize.calibration_sources`` names a source of which there is nothing.
        ShardError: A label or verdict file is missing, damaged or of another shard; or no utterance has a text.
    """
    labelled = read_used_labels(run, TRAIN, wanted=is_silence)
    rows, is_silent = labelled.rows, labelled.is_wanted
    if sources := run.quantize.calibration_sources:
        of_sources = rows.utterances.places_of(sources, setting="quantize.calibration_sources")
        rows, is_silent = rows.take(of_sources), is_silent[of_sources]
    if is_silent.all():
        raise ShardError(
            f"{run.stage_folder('label')} must hold usable labels with a text of the split {TRAIN!r}, got {len(rows)} "
            f"of silence alone ({dict(labelled.dropped)}); see pack.inputs and label.filters"
        )
    wanted, silent, spoken = run.quantize.calibration_utterances, np.flatnonzero(is_silent), np.flatnonzero(~is_silent)
    num_silent = min(len(silent), _quota(min(wanted, len(spoken)), _ONE_SILENT_IN), wanted - 1)
    seconds = rows.utterances.numbers("duration_seconds")
    by_duration = silent[np.argsort(seconds[silent], kind="stable")]
    places = [*spoken[_strata(rows.take(spoken), wanted - num_silent, num_silent)], *_spread(by_duration, num_silent)]
    chosen = rows.take(places)
    codes, _ = languages_of(rows.take(places[: len(places) - num_silent]), detected_first=False)
    return CalibrationSet(
        rows=chosen,
        is_search=search_part(len(chosen), share=run.quantize.search_share),
        is_silent=is_silent[places],
        num_long=int((_is_long(chosen) & ~is_silent[places]).sum()),
        num_languages=len(np.unique(codes)),
    )


def is_silence(answer: Answer) -> bool:
    """Whether the teacher heard no speech, and nothing but that speaks against its answer. Pure.

    It names no language (or was told one), writes nothing, and ends. Where a filter doubts it for another reason, as
    when there is a human transcript, nobody knows what was said.
    """
    label, verdict = answer.label, answer.verdict
    says_nothing = not label.text and label.language is None and label.ended_by == ENDED_BY_END_TOKEN
    return says_nothing and (verdict.use != NOTHING or verdict.reasons == (NO_TEXT,))


def search_part(count: int, *, share: float) -> npt.NDArray[np.bool_]:
    """Which of so many utterances to search on, at equal distances: at least one, and never all unless it is one. Pure.

    Args:
        count: Utterances, in the order of their strata.
        share: ``quantize.search_share``, in (0, 1).
    """
    num_search = min(max(1, round(share * count)), max(1, count - 1))
    is_search = np.zeros(count, np.bool_)
    # Half a distance from both ends: the extremes of the first and the last stratum calibrate.
    is_search[((np.arange(num_search) + 0.5) * count / num_search).astype(np.int64)] = True
    return is_search


def share_out(total: int, available: Sequence[int], *, at_least: Sequence[int] | None = None) -> list[int]:
    """Split ``total`` as evenly as ``available`` allows; what a small group cannot give, the larger ones do. Pure.

    Args:
        total: To be split.
        available: What each group can give.
        at_least: What each gives in any case, no more than it has, together no more than ``total``; None for nothing.
    """
    quotas = list(at_least) if at_least is not None else [0] * len(available)
    for _ in range(min(total, sum(available)) - sum(quotas)):
        open_groups = [group for group, size in enumerate(available) if quotas[group] < size]
        quotas[min(open_groups, key=quotas.__getitem__)] += 1
    return quotas


def _quota(total: int, one_in: int) -> int:
    return max(1, total // one_in)


def _is_long(rows: LabelledTable) -> npt.NDArray[np.bool_]:
    seconds = rows.utterances.numbers("duration_seconds")
    return (seconds >= LONG_SECONDS[0]) & (seconds <= LONG_SECONDS[1])


def _strata(rows: LabelledTable, total: int, num_silent: int) -> list[int]:
    """Places of so many utterances with text, or of all."""
    seconds, is_long = rows.utterances.numbers("duration_seconds"), _is_long(rows)
    codes, names = languages_of(rows, detected_first=False)
    total = min(total, len(rows))
    long_counts = np.bincount(codes[is_long], minlength=len(names)).tolist()
    long_quotas = share_out(_quota(total + num_silent, _ONE_LONG_IN), long_counts)
    quotas = share_out(total, np.bincount(codes, minlength=len(names)).tolist(), at_least=long_quotas)
    by_duration = np.argsort(seconds, kind="stable")
    places: list[int] = []
    for code, (quota, long_quota) in enumerate(zip(quotas, long_quotas, strict=True)):
        ordered = by_duration[codes[by_duration] == code]
        picked = _spread(ordered, quota)
        if is_long[picked].sum() < long_quota:
            others, long = ordered[~is_long[ordered]], ordered[is_long[ordered]]
            # From the longest down: it is the one that is taken where only one is.
            picked = np.concatenate([_spread(others, quota - long_quota), _spread(long[::-1], long_quota)])
            picked = picked[np.argsort(seconds[picked], kind="stable")]
        places += picked.tolist()
    return places


def _spread(ordered: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """So many of them at equal distances, the first and the last included; of one, the first."""
    return ordered[np.linspace(0, len(ordered) - 1, count).round().astype(np.int64)]
