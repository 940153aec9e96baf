"""label: the teacher decodes every shard, each rank its own; a missing label file is work to do."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from qad_dist.asr.dataset import mels_ahead
from qad_dist.asr.load import AsrModel, load_teacher
from qad_dist.asr.transcribe import transcribe
from qad_dist.config import RunConfig
from qad_dist.runtime.collectives import barrier, run_on_main
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import begin_stage, finish_stage, is_finished, model_fingerprint, require_stage
from qad_dist.runtime.world import World, check_enough_work, device_for, joined_world
from shards.errors import ShardError
from shards.index import ShardEntry, UtteranceTable, read_index, read_utterances
from shards.labels import LabelHeader, label_path, read_labels, write_labels
from shards.plan import plan_decoding
from shards.schema import ENDED_BY_LENGTH, PseudoLabel, Utterance
from shards.workers import Reader

log = logging.getLogger(__name__)

FINISH_LINE_SECONDS = 7 * 24 * 3600
"""How long a rank that is done waits for the others; a rank that died ends them all through its launcher."""


def run(run: RunConfig) -> None:
    """Label all shards of ``label.splits``; does nothing if that was done with this config already.

    Raises:
        QadError: The packed shards are missing or damaged, or the teacher cannot be loaded.
    """
    with joined_world(FINISH_LINE_SECONDS) as world:
        require_stage(run, "pack")
        by_shard = _utterances_by_shard(run)
        if run_on_main(lambda: _is_done(run, by_shard)):
            log.info("event=skipped stage=label reason=finished folder=%s", run.stage_folder("label"))
            return
        _check_world(world, by_shard)
        teacher = load_teacher(run.model, device_for(world))
        run_on_main(lambda: begin_stage(run, "label"))
        fingerprint = model_fingerprint(teacher.folder)
        with open_reader(run) as reader:
            _label_own_shards(run, teacher, fingerprint, by_shard, reader, world)
        barrier()
        run_on_main(lambda: finish_stage(run, "label", results=_summary(run, by_shard, fingerprint)))


def verify(run: RunConfig) -> None:
    """Check that every utterance of ``label.splits`` has exactly one label, made from the shard in the index.

    Raises:
        ShardError: Names the first label file that is missing, damaged, stale or incomplete.
    """
    num_labels = sum(len(labels) for labels in _checked_labels(run, _utterances_by_shard(run)))
    log.info("event=verified labels=%d", num_labels)


def dry_run(run: RunConfig) -> None:
    """Say how much there is to label."""
    by_shard = _utterances_by_shard(run)
    hours = sum(utterances.numbers("duration_seconds").sum() for utterances in by_shard.values()) / 3600
    done = sum(label_path(run.stage_folder("label"), shard).is_file() for shard in by_shard)
    log.info("event=dry_run stage=label shards=%d finished=%d hours=%.2f", len(by_shard), done, hours)


def _is_done(run: RunConfig, by_shard: dict[str, UtteranceTable]) -> bool:
    """Whether the stage is finished and nobody has deleted a label file since, which is how to ask for it again."""
    folder = run.stage_folder("label")
    return is_finished(run, "label") and all(label_path(folder, shard).is_file() for shard in by_shard)


def _utterances_by_shard(run: RunConfig) -> dict[str, UtteranceTable]:
    """In the order of the index, in which the utterances of a shard lie together."""
    table = read_utterances(run.stage_folder("pack"), splits=run.label.splits)
    if not len(table):
        raise ShardError(f"label.splits must name splits that were packed, got {run.label.splits}; see `pack.py stats`")
    codes, names = table.codes("shard")
    begins = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(table)]
    return {str(names[codes[begin]]): table[begin:end] for begin, end in pairwise(begins)}


def _check_world(world: World, by_shard: dict[str, UtteranceTable]) -> None:
    num_utterances = sum(map(len, by_shard.values()))
    check_enough_work(world, num_utterances, stage="label")
    if len(by_shard) < world.world_size and world.is_main:
        log.warning(
            "event=idle_ranks shards=%d ranks=%d remedy='lower pack.hours_per_shard'",
            *(len(by_shard), world.world_size),
        )


def _label_own_shards(
    run: RunConfig,
    teacher: AsrModel,
    fingerprint: str,
    by_shard: dict[str, UtteranceTable],
    reader: Reader,
    world: World,
) -> None:
    entries = [entry for entry in read_index(run.stage_folder("pack")).shards if entry.name in by_shard]
    own = entries[world.rank :: world.world_size]
    begun, seconds, num_utterances = time.monotonic(), 0.0, 0
    # Without a terminal the bar would be a screenful of control characters: the log lines below tell the same.
    progress = tqdm(own, desc="label", unit="shard", disable=None if world.is_main else True)
    for number, entry in enumerate(progress, start=1):
        path = label_path(run.stage_folder("label"), entry.name)
        header = _header(run, entry, fingerprint)
        if _is_labelled(path, header):
            log.info("event=skipped shard=%s reason=labelled", entry.name)
            continue
        labels = _label_shard(run, teacher, list(by_shard[entry.name]), reader)
        write_labels(path, header, labels)
        seconds += entry.seconds
        num_utterances += len(labels)
        rtfx = seconds / (time.monotonic() - begun)
        log.info(
            "event=labelled shard=%s utterances=%d audio_hours=%.3f rtfx=%.0f eta_seconds=%.0f",
            *(entry.name, num_utterances, seconds / 3600, rtfx),
            sum(later.seconds for later in own[number:]) / rtfx,
        )


def _is_labelled(path: Path, header: LabelHeader) -> bool:
    if not path.is_file():
        return False
    try:
        return read_labels(path)[0] == header
    except ShardError as damage:
        log.warning("event=damaged error=%r; its shard is labelled again", str(damage))
        return False


def _label_shard(
    run: RunConfig, teacher: AsrModel, utterances: Sequence[Utterance], reader: Reader
) -> list[PseudoLabel]:
    """Labels of one shard, in its order. What is in a batch depends on shard and settings only."""
    labels: dict[int, PseudoLabel] = {}
    durations = [utterance.duration_seconds for utterance in utterances]
    plan = plan_decoding(durations, batch_audio_seconds=run.label.batch_audio_seconds)
    batches = [[utterances[i] for i in indices] for indices in plan]
    loaded = mels_ahead(reader, batches, teacher.extractor)
    for indices, chosen, mels in zip(plan, batches, loaded, strict=True):
        hypotheses = transcribe(teacher, mels, max_response_tokens=run.label.max_response_tokens)
        for index, utterance, hypothesis in zip(indices, chosen, hypotheses, strict=True):
            labels[index] = PseudoLabel(
                key=utterance.key,
                token_ids=hypothesis.token_ids,
                text=hypothesis.text,
                language=hypothesis.language,
                token_logprobs=hypothesis.token_logprobs,
                mean_logprob=sum(hypothesis.token_logprobs) / len(hypothesis.token_logprobs),
                ended_by=hypothesis.ended_by,
                duration_seconds=utterance.duration_seconds,
            )
    return [labels[index] for index in range(len(utterances))]


def _header(run: RunConfig, entry: ShardEntry, fingerprint: str) -> LabelHeader:
    settings = {
        "prompt": "automatic language",
        "dtype": run.model.dtype,
        "audio_attention": run.model.audio_attention,
        "batch_audio_seconds": run.label.batch_audio_seconds,
        "max_response_tokens": run.label.max_response_tokens,
    }
    return LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher=fingerprint, settings=settings)


def _checked_labels(run: RunConfig, by_shard: dict[str, UtteranceTable]) -> Iterator[list[PseudoLabel]]:
    """The labels of one shard after the other, each held against the index."""
    hashes = {entry.name: entry.sha256 for entry in read_index(run.stage_folder("pack")).shards}
    for shard, utterances in by_shard.items():
        path = label_path(run.stage_folder("label"), shard)
        _, labels = read_labels(path, shard_sha256=hashes[shard])
        if [label.key for label in labels] != list(utterances.texts("key")):
            raise ShardError(f"{path} must label each utterance of {shard} once, got others; delete it and label again")
        yield labels


def _summary(run: RunConfig, by_shard: dict[str, UtteranceTable], fingerprint: str) -> dict[str, object]:
    num_labels = num_tokens = num_runaway = 0
    seconds = 0.0
    languages: Counter[str] = Counter()
    for labels in _checked_labels(run, by_shard):
        num_labels += len(labels)
        num_tokens += sum(len(label.token_ids) for label in labels)
        num_runaway += sum(label.ended_by == ENDED_BY_LENGTH for label in labels)
        seconds += math.fsum(label.duration_seconds for label in labels)
        languages.update(label.language or "None" for label in labels)
    log.info(
        "event=finished stage=label utterances=%d audio_hours=%.3f tokens=%d runaway=%d languages=%d",
        *(num_labels, seconds / 3600, num_tokens, num_runaway, len(languages)),
    )
    return {
        "teacher": fingerprint,
        "utterances": num_labels,
        "audio_hours": seconds / 3600,
        "response_tokens": num_tokens,
        "runaway": num_runaway,
        "utterances_by_language": dict(sorted(languages.items())),
    }
