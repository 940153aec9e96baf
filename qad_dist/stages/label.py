"""label: the teacher decodes every shard once, on whichever rank takes it; a missing label file is work to do.

Shards are tasks that ranks claim: no rank waits for another before all are done, and one that is labelled twice gets
the same bytes. Behind its label file each shard gets its verdicts: which labels are used, and why not the others.
"""

import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from qad_dist.asr.labeller import Labeller, open_labeller
from qad_dist.asr.load import resolve_model_folder
from qad_dist.config import RunConfig
from qad_dist.labelling import NONE, Labelling
from qad_dist.runtime.collectives import barrier, run_on_main
from qad_dist.runtime.progress import Progress
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.record import begin_stage, finish_stage, is_finished, require_stage
from qad_dist.runtime.world import World, check_enough_work, joined_world
from qad_dist.text.label_picture import draw_report
from qad_dist.text.label_report import (
    ACCEPT_JSON,
    ACCEPT_MARKDOWN,
    ACCEPT_PICTURE,
    LabelReport,
    report_markdown,
    report_text,
)
from shards.claims import Claims
from shards.errors import ShardError
from shards.faults import fault_point
from shards.labelled import better_answers
from shards.labels import label_path, second_path, write_labels
from shards.pictures import drawn_if_possible
from shards.read import Damaged
from shards.schema import ENDED_BY_LENGTH
from shards.selection import own_first
from shards.storage import atomic_write, write_json
from shards.verdicts import stored_verdicts

log = logging.getLogger(__name__)

FINISH_LINE_SECONDS = 7 * 24 * 3600
"""How long a rank that is done waits for the others; a rank that died ends them all through its launcher."""

CLAIMS = "claims"
"""Folder below ``<run>/label`` while shards are being labelled: who works on which."""


def run(run: RunConfig) -> None:
    """Label all shards of ``label.splits`` and judge the labels; does nothing if that was done with this config.

    Raises:
        QadError: The packed shards are missing or damaged, or the teacher cannot be loaded.
    """
    with joined_world(FINISH_LINE_SECONDS) as world:
        require_stage(run, "pack")
        work = Labelling(run)
        if run_on_main(lambda: _is_finished(run, work)):
            log.info("event=skipped stage=label reason=finished folder=%s", work.folder)
            return
        _check_world(world, work)
        run_on_main(lambda: resolve_model_folder(run.model.path, run.model.revision))  # one rank alone downloads it
        left = run_on_main(lambda: [shard for shard in work.order if not work.is_done(shard)])
        with ExitStack() as stack:
            if left:
                reader = stack.enter_context(open_reader(run))
                longest = max(task.longest_seconds for task in work.tasks.values())
                labeller = stack.enter_context(open_labeller(run, reader, world, longest_seconds=longest))
            run_on_main(lambda: begin_stage(run, "label"))
            if left:
                _label(work, left, labeller, world)
        barrier()
        run_on_main(lambda: _finish(work))


def judge(run: RunConfig) -> None:
    """Judge the labels of a finished run anew, by what ``label.filters`` says now, and print the report.

    Raises:
        ShardError: A label file is missing, damaged, or was made with other settings.
    """
    require_stage(run, "pack")
    work = Labelling(run)
    begin_stage(run, "label")
    _finish(work)


def verify(run: RunConfig) -> None:
    """Check that every chosen utterance has exactly one label, made from the shard in the index, and its verdict.

    Raises:
        ShardError: Names the first label file that is missing, damaged, stale or incomplete.
    """
    work = Labelling(run)
    num_labels = num_second = 0
    for shard in work.tasks:
        first = work.read_first(shard)
        num_labels += len(stored_verdicts(first))
        if run.label.second_pass != NONE:
            num_second += len(stored_verdicts(work.read_second(shard, first)))
    log.info("event=verified labels=%d second_pass=%d", num_labels, num_second)


def dry_run(run: RunConfig) -> None:
    """Say how much there is to label."""
    work = Labelling(run)
    done = sum(label_path(work.folder, shard).is_file() for shard in work.tasks)
    hours = sum(task.seconds for task in work.tasks.values()) / 3600
    log.info("event=dry_run stage=label shards=%d finished=%d hours=%.2f", len(work.tasks), done, hours)


def _is_finished(run: RunConfig, work: Labelling) -> bool:
    """Whether the stage is finished and nobody has deleted a label file since, which is how to ask for it again."""
    return is_finished(run, "label") and all(label_path(work.folder, shard).is_file() for shard in work.tasks)


def _check_world(world: World, work: Labelling) -> None:
    check_enough_work(world, work.num_utterances, stage="label")
    if len(work.tasks) < world.world_size and world.is_main:
        log.warning(
            "event=idle_ranks shards=%d ranks=%d remedy='lower pack.hours_per_shard'",
            *(len(work.tasks), world.world_size),
        )


def _label(work: Labelling, left: Sequence[str], labeller: Labeller, world: World) -> None:
    """Label what this rank can claim of ``left``, until all of it is labelled, whoever did it."""
    run, progress = work.run, Progress("label")
    done: set[str] = set()
    damaged: list[Damaged] = []

    def left_seconds() -> float:
        done.update(shard for shard in left if shard not in done and label_path(work.folder, shard).is_file())
        return sum(work.tasks[shard].seconds for shard in left if shard not in done)

    def tell(*, now: bool = False) -> None:
        progress.tell(left_seconds=left_seconds, ranks=world.world_size, now=now)

    with Claims(work.folder / CLAIMS, f"rank-{world.rank}", run.label.stale_seconds) as claims:
        for shard in claims.take(own_first(left, rank=world.rank, world_size=world.world_size), work.is_done):
            steps = 0

            def on_step(shard: str = shard) -> None:
                nonlocal steps
                steps += 1
                fault_point("label.decode", shard=shard, step=steps)
                claims.beat()
                tell()

            damaged += _label_shard(work, shard, labeller, damaged, on_step)
            done.add(shard)
            task = work.tasks[shard]
            progress.add(utterances=len(task.utterances), audio_seconds=task.seconds)
            log.info("event=labelled shard=%s utterances=%d steps=%d", shard, len(task.utterances), steps)
    tell(now=True)


def _label_shard(
    work: Labelling, shard: str, labeller: Labeller, damaged: Sequence[Damaged], on_step: Callable[[], None]
) -> list[Damaged]:
    """Write what is missing of a shard: labels, verdicts, second labels. Gives what could not be read of it."""
    utterances = list(work.tasks[shard].utterances)
    found: list[Damaged] = []
    if (first := work.find_first(shard)) is None:
        told = work.run.label.language == "manifest"
        labelled = labeller.label(utterances, [u.language if told else None for u in utterances], on_step=on_step)
        found = labelled.damaged
        if len(found) == len(utterances):
            raise ShardError(found[0].reason)  # it is the shard that must be mended
        work.refuse_too_much_damage([*damaged, *found])  # before there is a label file
        # Another rank may have taken the shard over meanwhile: what it has judged must not change under its verdicts.
        if work.find_first(shard) is None:
            header = replace(work.header(shard), engine=labeller.engine)
            write_labels(label_path(work.folder, shard), header, labelled.labels, states_TD=labelled.hidden_TD)
        first = work.read_first(shard)
    verdicts = work.judge(first)
    if work.run.label.second_pass != NONE and not work.is_done(shard):
        chosen = [utterances[place] for place in work.rejected(shard, verdicts)]
        labelled = labeller.label(chosen, [utterance.language for utterance in chosen], on_step=on_step)
        if not work.is_done(shard):  # as above
            header = replace(work.header(shard, first_sha256=first.sha256), engine=labeller.engine)
            write_labels(second_path(work.folder, shard), header, labelled.labels, states_TD=labelled.hidden_TD)
        work.judge(work.read_second(shard, first))
    return found


def _finish(work: Labelling) -> None:
    """Judge what nobody has judged, write the report, then the stage's record."""
    report, results, languages = LabelReport(), Counter[str](), Counter[str]()
    damaged: list[Damaged] = []
    for shard, task in work.tasks.items():
        first = work.read_first(shard)
        second = work.read_second(shard, first) if work.run.label.second_pass != NONE else None
        answers = better_answers(first, second, work.judge)
        labels = [answer.label for answer in answers.values()]
        report.add(labels, [answer.verdict for answer in answers.values()], list(task.utterances.texts("language")))
        languages.update(label.language or "None" for label in labels)
        results["utterances"] += len(labels)
        results["response_tokens"] += sum(label.num_tokens for label in labels)
        results["runaway"] += sum(label.ended_by == ENDED_BY_LENGTH for label in labels)
        results["second_pass"] += 0 if second is None else len(second.labels)
        damaged += [Damaged(key=one.key, shard=shard, reason=one.error) for one in first.labels if one.error]
    work.refuse_too_much_damage(damaged)
    summary = report.summary()
    write_json(work.folder / ACCEPT_JSON, summary)
    with atomic_write(work.folder / ACCEPT_MARKDOWN) as file:
        file.write(report_markdown(summary).encode())
    picture = work.folder / ACCEPT_PICTURE
    with drawn_if_possible(picture, log):
        draw_report(summary, picture)
    # Claims of processes that were killed when their shard was done; those of another job are through as well.
    shutil.rmtree(work.folder / CLAIMS, ignore_errors=True)
    log.info(
        "event=finished stage=label utterances=%d audio_hours=%.3f tokens=%d runaway=%d unreadable=%d languages=%d",
        *(results["utterances"], summary["hours"], results["response_tokens"], results["runaway"]),
        *(len(damaged), len(languages)),
    )
    finish_stage(
        work.run,
        "label",
        results={
            "teacher": work.teacher,
            "audio_hours": summary["hours"],
            **{name: results[name] for name in ("utterances", "response_tokens", "runaway", "second_pass")},
            "unreadable": len(damaged),
            "used": {use: amount["utterances"] for use, amount in summary["use"].items()},
            "utterances_by_language": dict(sorted(languages.items())),
        },
    )
    sys.stdout.write(report_text(summary) + f"Examples: {work.folder / ACCEPT_MARKDOWN}\n")
    sys.stdout.flush()
