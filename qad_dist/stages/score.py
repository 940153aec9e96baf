"""score: every system answers the same utterances; errors are counted, and what the counts can tell apart is said."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qad_dist.answering import Section, answer_all, decoding_settings, read_answers, sections_of
from qad_dist.answers import Answered
from qad_dist.config import RunConfig
from qad_dist.config.score import TEACHER
from qad_dist.judging import cases_of, judge_section
from qad_dist.runtime.collectives import run_on_main
from qad_dist.runtime.record import begin_stage, finish_stage, require_stage, stages_read
from qad_dist.runtime.world import joined_world
from qad_dist.systems import System, find_systems, verify_students
from qad_dist.test_sets import missing_test_sets, open_test_sets, prepare_test_sets
from qad_dist.text.normalize import NORMALIZER
from qad_dist.text.score_picture import SCORE_PICTURE, draw_scores
from qad_dist.text.table import SCORE, SPEED, judged_student, score_markdown, score_summary, score_table
from qad_dist.text.worst import worst_lines, worst_markdown, worst_utterances
from shards.errors import StageError
from shards.pictures import drawn_if_possible
from shards.storage import atomic_write, read_json, write_json

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 24 * 3600
"""How long a rank waits for the others, while the first one packs test sets or slower ones decode."""

MARKDOWN, WORST = "score.md", "worst"


def run(run: RunConfig) -> None:
    """Score teacher, students and ``score.systems`` on all test sets; print the outcome.

    Raises:
        QadError: An earlier stage is missing, a test set cannot be used, or a system cannot be loaded.
    """
    with joined_world(TIMEOUT_SECONDS) as world:
        for stage in stages_read(run, "score"):
            require_stage(run, stage)
        run_on_main(lambda: find_systems(run))  # first one rank alone: a hub id is downloaded
        systems = find_systems(run)
        run_on_main(lambda: verify_students(run))
        run_on_main(lambda: prepare_test_sets(run))  # before the stage begins, which notes what the sets are
        run_on_main(lambda: begin_stage(run, "score"))
        sections = sections_of(run, open_test_sets(run))
        answer_all(run, systems, sections, world)
        run_on_main(lambda: _finish(run, systems, sections))


def table(run: RunConfig) -> None:
    """Print the tables of a finished score again."""
    require_stage(run, "score")
    folder = run.stage_folder("score")
    sys.stdout.write(score_table(read_json(folder / SCORE), read_json(folder / SPEED)))


def dry_run(run: RunConfig) -> None:
    """Say what would be scored."""
    names = [TEACHER, *run.score.students, *run.score.systems]
    missing = missing_test_sets(run)
    if missing:
        log.info("event=dry_run stage=score to_pack=%s systems=%s", missing, names)
        return
    for section in sections_of(run, open_test_sets(run)):
        utterances = section.test_set.utterances
        log.info(
            "event=dry_run stage=score section=%s utterances=%d audio_hours=%.3f systems=%s",
            *(section.name, len(utterances), _hours(section), names),
        )


def _hours(section: Section) -> float:
    return float(section.test_set.utterances.numbers("duration_seconds").sum()) / 3600


def _finish(run: RunConfig, systems: Sequence[System], sections: Sequence[Section]) -> None:
    """Judge the answers, and write and print what comes of it."""
    score: dict[str, Any] = {
        "normalizer": NORMALIZER,
        "margin": run.score.margin,
        "num_resamples": run.score.num_resamples,
        "decoding": decoding_settings(run),
        "dtype": run.model.dtype,
        "arithmetic": run.score.arithmetic,
        "sections": {},
    }
    speed: dict[str, Any] = {}
    served_bytes: dict[str, int | None] = {}
    for section in sections:
        answered = {system.name: _answered(run, system, systems[0], section) for system in systems}
        score["sections"][section.name] = _judge(run, section, answered)
        speed[section.name] = _speeds(section, answered)
        served_bytes |= {name: own.served_bytes for name, own in answered.items()}
    score["systems"] = {
        system.name: {
            "path": system.path,
            "disk_bytes": system.disk_bytes(),
            "served_bytes": served_bytes[system.name],
        }
        for system in systems
    }
    folder = run.stage_folder("score")
    write_json(folder / SCORE, score)
    write_json(folder / SPEED, speed)
    with atomic_write(folder / MARKDOWN) as file:
        file.write(score_markdown(score).encode())
    with drawn_if_possible(folder / SCORE_PICTURE, log):
        draw_scores(score, folder / SCORE_PICTURE)
    overall = {
        name: {system: rows["overall"]["error_rate"] for system, rows in section["systems"].items()}
        for name, section in score["sections"].items()
    }
    finish_stage(run, "score", results={"error_rate": overall})
    sys.stdout.write(score_summary(score, speed))
    worst = ", ".join(str(section.files.folder / f"{WORST}.md") for section in sections)
    sys.stdout.write(f"By language: launch/score.py table, or {folder / MARKDOWN}. Worst utterances: {worst}\n")
    sys.stdout.flush()


def _answered(run: RunConfig, system: System, teacher: System, section: Section) -> Answered:
    answered = read_answers(run, system, teacher, section)
    if answered is None:
        path = section.files.predictions(system.name)
        raise StageError(f"{path} must stay as it was written, got other bytes; is another job writing? score again")
    return answered


def _judge(run: RunConfig, section: Section, answered: Mapping[str, Answered]) -> dict[str, Any]:
    """A section of ``score.json``; its worst utterances are written beside its answers."""
    test_set = section.test_set
    utterances = list(test_set.utterances)
    answers = {name: own.answers for name, own in answered.items()}
    student = judged_student(answers)
    worst = worst_utterances(cases_of(utterances, answers), system=student, number=run.score.worst_utterances)
    with atomic_write(section.files.folder / f"{WORST}.md") as file:
        file.write(worst_markdown(worst, section=section.name).encode())
    write_json(section.files.folder / f"{WORST}.json", list(worst_lines(worst)))
    return {
        "audio_attention": section.audio_attention,
        "fingerprint": test_set.fingerprint,
        "num_utterances": len(utterances),
        "num_in_all": test_set.num_in_all,
        "num_rejected": test_set.num_rejected,
        "num_references": sum(utterance.reference is not None for utterance in utterances),
        "audio_hours": _hours(section),
        **judge_section(run, utterances, answers),
    }


def _speeds(section: Section, answered: Mapping[str, Answered]) -> dict[str, Any]:
    """How fast each system answered; the only numbers that depend on machine and ranks."""
    seconds = _hours(section) * 3600
    return {
        name: {
            "audio_seconds": seconds,
            "rank_seconds": own.seconds,
            "rtfx_per_rank": seconds / own.seconds if own.seconds else None,
        }
        for name, own in answered.items()
    }
