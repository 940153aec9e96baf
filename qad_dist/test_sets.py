"""Test sets: the run's own and others by name or path, packed once into the run, and opened alike by every rank.

What is scored is a test set as it is: nothing is set aside, no copy is dropped, and no utterance is cut, since a piece
of one has no reference. Only what cannot be decoded, or is longer than any model here takes, is left out, and named.
"""

import logging
import os
import re
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qad_dist.config import RunConfig
from qad_dist.config.score import TestSetConfig
from qad_dist.packing import keep_finished, kept_plan, merge_packed, pack_part, read_rejected, results_of, spool_of
from qad_dist.runtime.record import DONE, SETS, package_versions, stage_command
from shards.audio import MAX_SECONDS
from shards.errors import ConfigError, QadError, ShardError, SourceError, StageError
from shards.index import INDEX, UtteranceTable, read_index, read_utterances
from shards.known_sets import KnownSet, begins_as_known, find_known, known_set
from shards.languages import language_name
from shards.layout import ShardSize
from shards.merge import REJECTED, PackReport
from shards.places import Place
from shards.schema import SPLITS, TEST, Utterance
from shards.shard import ShardSettings
from shards.sources import AUTO, read_found
from shards.sources.folder import is_audio
from shards.sources.keys import Found
from shards.splits import seeded_ranks
from shards.storage import fingerprint, read_json, sha256_file, write_json
from shards.tasks import Layout, plan_pack
from shards.verify import verify

log = logging.getLogger(__name__)

OWN = "own"
"""Name of the set that is ``score.splits`` of the run's own shards."""

# The same for every run, so that a set has the same shards and fingerprint in all. 5 hours keep 20 processes busy.
_LAYOUT = Layout(
    seed=0, splits={TEST: TEST}, holdout=0.0, holdout_by="recording", size=ShardSize(hours=0.25, recordings=10_000)
)
# Larger files are archives that lie beside what is read, or recordings: their size stands for what is in them.
_HASHED_BYTES = 256 << 20
_PACK_SETTING = re.compile(r"\bpack\.(inputs|source|language|splits)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSet:
    """Utterances that every system is scored on."""

    __test__ = False  # no test, whatever its name makes of it

    name: str
    folder: Path
    """The packed folder that they are in: :func:`~qad_dist.runtime.reading.open_reader` reads it."""
    utterances: UtteranceTable
    """Those that are scored, in the order of the index. Some may have no reference, but not all."""
    num_in_all: int
    """Utterances of the set, whether they were drawn or not."""
    num_rejected: int
    """Recordings of it that the pack left out; ``rejected.jsonl`` in the folder names them."""
    fingerprint: str
    """Of what decides its content: the shards, and of the chosen utterances what is known of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """A set that has to be packed."""

    name: str
    config: TestSetConfig
    known: KnownSet | None
    folder: Path
    """That it is packed into."""
    settings: dict[str, Any]
    """Those that decide what is packed."""


def missing_test_sets(run: RunConfig) -> list[str]:
    """Names of ``score.sets`` that still have to be packed, or have to be again, their settings or input being others.

    What a set was packed from may be gone. This looks at every file of the inputs: one rank only, as it takes a while.

    Raises:
        ConfigError: A name begins as that of a known set and goes on otherwise.
    """
    return [corpus.name for corpus in _corpora(run) if not _is_packed(corpus)]


def prepare_test_sets(run: RunConfig) -> None:
    """Pack what :func:`missing_test_sets` names into ``<run>/score/sets/<name>``; go on where it was interrupted.

    One rank only. A set counts when its record is written, which is the last thing.

    Raises:
        ConfigError: A split is none of the source's, or a name begins as that of a known set and goes on otherwise.
        SourceError: An input is missing or is not what it should be, or a language is none of the model's.
        AudioError: More than ``pack.max_rejected_share`` of a set cannot be used.
        StageError: The folder cannot be written to, or a packing process died.
    """
    for corpus in _corpora(run):
        with _in_terms_of(corpus.name):
            if not _is_packed(corpus):
                _pack(run, corpus)


def open_test_sets(run: RunConfig) -> list[TestSet]:
    """The run's own set, if ``score.splits`` names one, then ``score.sets`` in their order; the same on every rank.

    Raises:
        StageError: A set is not packed yet, or was with other settings.
        ConfigError: A split is unknown, or a set has no utterance.
        ShardError: A set has no reference at all, or its folder is damaged.
        SourceError: A language is none of the model's.
    """
    opened = []
    if run.score.splits:
        opened.append(_opened(run, OWN, run.stage_folder("pack"), splits=run.score.splits))
    corpora = {corpus.name: corpus for corpus in _corpora(run)}
    for name, config in run.score.sets.items():
        if (corpus := corpora.get(name)) is None:
            with _in_terms_of(name):
                language = language_name(config.language)
            opened.append(_opened(run, name, Path(config.path), splits=_packed_splits(name, config), language=language))
        else:
            _require_packed(corpus)
            opened.append(_opened(run, name, corpus.folder, splits=[TEST]))
    return opened


def _corpora(run: RunConfig) -> list[_Corpus]:
    """The sets that are not packed already."""
    corpora = []
    for name, config in run.score.sets.items():
        if _is_packed_folder(config):
            continue
        known = known_set(name, source=config.source)
        settings = {
            "set": config.model_dump(mode="json"),
            "known": known and asdict(known),
            "min_audio_seconds": run.pack.min_audio_seconds,
        }
        folder = run.stage_folder("score") / SETS / name
        corpora.append(_Corpus(name=name, config=config, known=known, folder=folder, settings=settings))
    return corpora


def _is_packed_folder(config: TestSetConfig) -> bool:
    """Whether the path is used where it is; with a source it is read as that, index or not."""
    return config.source == AUTO and (Path(config.path) / INDEX).is_file()


def _is_packed(corpus: _Corpus) -> bool:
    """Whether the set is there, whole, and made from what its input is today; what is gone stays as it was packed."""
    if not _has_record(corpus):
        return False
    try:
        state = _state_of(_place_of(corpus))
    except SourceError:
        state = None
    if state is not None and state != read_json(corpus.folder / DONE)["inputs"]["input"]:
        return False
    try:
        verify(corpus.folder, quick=True)
    except ShardError as damage:
        log.warning("test set name=%s is packed again: %s", corpus.name, damage)
        return False
    return True


def _has_record(corpus: _Corpus) -> bool:
    path = corpus.folder / DONE
    return path.is_file() and fingerprint(read_json(path)["inputs"]["settings"]) == fingerprint(corpus.settings)


def _require_packed(corpus: _Corpus) -> None:
    if not _has_record(corpus):
        state = "one made with other settings" if (corpus.folder / DONE).is_file() else "none"
        raise StageError(
            f"{corpus.folder} must hold score.sets.{corpus.name} as this config has it, got {state}; "
            f"run `{stage_command('score')}`"
        )


def _place_of(corpus: _Corpus) -> Place:
    """Where its recordings are.

    Raises:
        SourceError: Nothing is there.
    """
    place = Place.of(corpus.config.path)
    if corpus.known is not None:
        return find_known(corpus.known, place, setting=f"score.sets.{corpus.name}.path")
    if not place.is_remote and not place.exists():
        raise SourceError(
            f"score.sets.{corpus.name}.path must be a corpus or a packed folder, got {place.url!r} (nothing at that "
            "path); mend the path"
        )
    return place


def _state_of(place: Place) -> str:
    """Of a file or a folder the names, the sizes of recordings, and the contents of all else. Of an address nothing.

    A transcript that is corrected may keep its length, so that sizes alone would not do.
    """
    if place.is_remote:
        return ""
    if place.is_file():
        return fingerprint(_file_state(place.url))
    return fingerprint([[name, _file_state(os.path.join(place.url, name))] for name in place.walk()])


def _file_state(path: str) -> int | str:
    try:
        size = Path(path).stat().st_size
        return size if is_audio(path) or size > _HASHED_BYTES else sha256_file(Path(path))
    except OSError:  # a link to nothing, or not ours to read: the source itself says so if it needs it
        return -1


def _pack(run: RunConfig, corpus: _Corpus) -> None:
    started, folder, place = time.monotonic(), corpus.folder, _place_of(corpus)
    inputs = {"settings": corpus.settings, "input": _state_of(place)}
    about = {"inputs": fingerprint(inputs)}
    log.info("packing test set name=%s path=%s into=%s", corpus.name, place.url, folder)
    tasks = kept_plan(folder, about) or plan_pack(
        _chosen(corpus, place, spool=spool_of(folder)), folder, _LAYOUT, about=about
    )
    keep_finished(tasks, max_rejected_share=run.pack.max_rejected_share)
    (folder / DONE).unlink(missing_ok=True)
    settings = ShardSettings(
        min_audio_seconds=run.pack.min_audio_seconds,
        max_audio_seconds=MAX_SECONDS,
        long_recordings="reject",
        max_recording_seconds=MAX_SECONDS,
    )
    share = run.pack.max_rejected_share
    pack_part(tasks, settings, max_rejected_share=share, processes=run.pack.processes)
    report = merge_packed(tasks, settings, drop_duplicates=False, max_rejected_share=share)
    results = results_of(report, time.monotonic() - started)
    write_json(folder / DONE, {"inputs": inputs, "results": results, "versions": package_versions()})
    tasks.remove()
    _tell_packed(corpus, report)


def _tell_packed(corpus: _Corpus, report: PackReport) -> None:
    log.info(
        "packed test set name=%s utterances=%d hours=%.3f", corpus.name, report.index.num_utterances, report.index.hours
    )
    if report.num_rejected:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.rejected_by_reason.items())
        log.warning(
            "test set name=%s has lost %d of %d recordings (%s), named in %s",
            *(corpus.name, report.num_rejected, report.num_recordings, reasons, corpus.folder / REJECTED),
        )


def _chosen(corpus: _Corpus, place: Place, *, spool: Path) -> Iterator[Found]:
    """The recordings that are scored, all of the split ``test``.

    Raises:
        ConfigError: A split is none of the source's.
    """
    config, known = corpus.config, corpus.known
    wanted = config.splits if config.splits is not None else known and known.splits
    setting = f"score.sets.{corpus.name}"
    told: set[str | None] = set()
    for found in read_found(
        [place.url],
        default_language=config.language,
        kind=known.source if known else config.source,
        spool=spool,
        setting=f"{setting}.path",
        splits=wanted,
    ):
        told.add(found.split)
        if wanted is None or found.split in wanted:
            yield replace(found, split=TEST)
    if wanted is not None and (not wanted or not told.issuperset(wanted)):
        names = ", ".join(sorted(filter(None, told))) or "none with a name"
        raise ConfigError(
            f"{setting}.splits must be splits of {place.url} ({names}), got {', '.join(wanted) or '[]'}; name some of "
            "those, or mend the path"
        )


def _packed_splits(name: str, config: TestSetConfig) -> Collection[str]:
    """The splits of a packed folder that are scored."""
    if config.splits is not None:
        if not config.splits or not set(SPLITS).issuperset(config.splits):
            raise ConfigError(
                f"score.sets.{name}.splits must be of {', '.join(SPLITS)} for a packed folder, got "
                f"{', '.join(config.splits) or '[]'}; name some of those"
            )
        return config.splits
    found = sorted(read_index(Path(config.path)).hours_by_split_language)
    if begins_as_known(name) and len(found) > 1:
        raise ConfigError(
            f"score.sets.{name}.splits must say what to score of the packed folder {config.path} ({', '.join(found)}), "
            "got none; a name chooses the split only of a corpus as it is downloaded"
        )
    return SPLITS


def _opened(
    run: RunConfig, name: str, folder: Path, *, splits: Collection[str], language: str | None = None
) -> TestSet:
    """A set of a packed folder; utterances that have no language get the one that is given."""
    utterances = read_utterances(folder, splits=splits)
    setting = "score.splits" if name == OWN else f"score.sets.{name}"
    if not len(utterances):
        remedy = "name others, or [] to score score.sets only" if name == OWN else "name others, or another folder"
        raise ConfigError(
            f"{setting} must name utterances, got none in {folder} of the splits {', '.join(splits)}; {remedy}"
        )
    if language is not None:
        utterances = _in_language(utterances, language)
    chosen = utterances
    if run.score.max_utterances is not None and len(utterances) > run.score.max_utterances:
        ranks = seeded_ranks(run.seed, (str(key) for key in utterances.texts("key")))
        chosen = utterances.take(np.sort(np.argsort(ranks)[: run.score.max_utterances]))
    num_references = len(chosen) - chosen.table.column("reference").null_count
    if not num_references:
        raise ShardError(
            f"{setting} must name utterances with references, got {len(chosen)} of {folder}, none with a reference; "
            "pack a test set with transcripts"
        )
    rejected = read_rejected(folder) if (folder / REJECTED).is_file() else []
    num_rejected = sum(row["split"] in splits for row in rejected)
    log.info(
        "test set name=%s utterances=%d/%d hours=%.3f with_reference=%d rejected=%d",
        *(name, len(chosen), len(utterances), chosen.numbers("duration_seconds").sum() / 3600),
        *(num_references, num_rejected),
    )
    about = [list(chosen.texts(column)) for column in ("key", "language", "speaker", "reference")]
    return TestSet(
        name=name,
        folder=folder,
        utterances=chosen,
        num_in_all=len(utterances),
        num_rejected=num_rejected,
        fingerprint=fingerprint(read_index(folder).fingerprint, about),
    )


def _in_language(utterances: UtteranceTable, language: str) -> UtteranceTable:
    table = utterances.table
    column = pc.fill_null(table.column("language").cast(pa.string()), language)
    return UtteranceTable(Utterance, table.set_column(table.schema.get_field_index("language"), "language", column))


@contextmanager
def _in_terms_of(name: str) -> Generator[None]:
    """What packs names the settings of ``pack:``; here they are those of a set."""
    try:
        yield
    except QadError as cause:
        names = {"inputs": "path"}
        text = _PACK_SETTING.sub(lambda match: f"score.sets.{name}.{names.get(match[1], match[1])}", str(cause))
        told = text if text.startswith("score.sets") else f"score.sets.{name}: {text}"
        raise type(cause)(told) from cause
