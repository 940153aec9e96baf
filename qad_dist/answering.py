"""All ranks let every system of a score answer every test set; nothing that was answered before is answered again.

Utterances are decoded in groups that follow from set and settings, so that any number of ranks gives the same answers,
and each group is a file as soon as it is done. The teacher answers first: how far the others are from it is measured on
its own response tokens, with both models in the same batch: states that came out of other batches would differ by as
much as INT8 does, in bfloat16.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qad_dist.answers import Answer, Answered, AnswerFiles
from qad_dist.asr.collate import Example, collate
from qad_dist.asr.dataset import mels_ahead
from qad_dist.asr.decoder import DecoderStack
from qad_dist.asr.groups import Group, GroupDecoder, plan_groups
from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import Hypothesis
from qad_dist.config import RunConfig
from qad_dist.config.decoding import DecodingSection
from qad_dist.distill.evaluate import batch_distances
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.pairing import join_models, share_if_equal, vocabulary_difference
from qad_dist.runtime.collectives import barrier, run_on_main
from qad_dist.runtime.progress import Progress
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.world import World, device_for
from qad_dist.systems import System, load_system
from qad_dist.test_sets import TestSet
from qad_dist.text.predictions import read_predictions
from shards.errors import ConfigError, SourceError
from shards.faults import fault_point
from shards.languages import language_name
from shards.storage import fingerprint
from shards.workers import Reader

log = logging.getLogger(__name__)

NUM_GROUPS, SMALLEST_GROUP = 64, 32
"""A set is decoded in about so many groups, none of fewer utterances: what ranks share, and what a kill costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A test set in an attention mode: what one table of a score is about."""

    name: str
    test_set: TestSet
    audio_attention: str
    files: AnswerFiles

    @property
    def keys(self) -> list[str]:
        """Of its utterances, in order."""
        return [str(key) for key in self.test_set.utterances.texts("key")]


def sections_of(run: RunConfig, test_sets: Sequence[TestSet]) -> list[Section]:
    """Every test set in every attention mode; the mode is in the name where there are several."""
    modes = run.score.audio_attention or [run.model.audio_attention]
    return [
        Section(name=name, test_set=test_set, audio_attention=mode, files=AnswerFiles(section_folder(run, name)))
        for mode in modes
        for test_set in test_sets
        for name in [test_set.name if len(modes) == 1 else f"{test_set.name}-{mode}"]
    ]


def section_folder(run: RunConfig, name: str) -> Path:
    """Where the answers of a section are."""
    return run.stage_folder("score") / name


def answer_all(run: RunConfig, systems: Sequence[System], sections: Sequence[Section], world: World) -> None:
    """See that the answers of every system to every section are there; all ranks together.

    Raises:
        QadError: A system cannot be loaded, an utterance cannot be read, or predictions do not fit the set.
    """
    for mode in dict.fromkeys(section.audio_attention for section in sections):
        models = _Models(run, mode, world)
        for system in systems:
            for section in sections:
                if section.audio_attention == mode:
                    _answer(run, system, systems[0], section, models, world)


def read_answers(run: RunConfig, system: System, teacher: System, section: Section) -> Answered | None:
    """The answers of a system to a section; None where they are still to be made."""
    about = _about(run, system, teacher, section)
    return section.files.read(system.name, about, section.test_set.utterances)


class _Models:
    """The models that are in memory: the teacher, and one other system."""

    def __init__(self, run: RunConfig, audio_attention: str, world: World) -> None:
        self._run, self._audio_attention, self._world = run, audio_attention, world
        self._teacher: AsrModel | None = None
        self._other: tuple[str, AsrModel] | None = None
        self.served_bytes: dict[str, int | None] = {}
        """Of the systems that were loaded, by name."""

    def get(self, system: System) -> AsrModel:
        """A system: the teacher stays, of the others the one before is let go first."""
        if system.is_teacher:
            self._teacher = self._teacher or self._load(system)
            return self._teacher
        if self._other is None or self._other[0] != system.name:
            self._other = None
            self._other = system.name, self._load(system)
        return self._other[1]

    def _load(self, system: System) -> AsrModel:
        device = device_for(self._world)
        model, num_bytes = load_system(self._run, system, audio_attention=self._audio_attention, device=device)
        self.served_bytes[system.name] = num_bytes
        return replace(model, prompt=model.prompt.with_context(self._run.score.context))


def _answer(run: RunConfig, system: System, teacher: System, section: Section, models: _Models, world: World) -> None:
    utterances = section.test_set.utterances
    about = run_on_main(lambda: _about(run, system, teacher, section))
    if run_on_main(lambda: section.files.read(system.name, about, utterances) is not None):
        return
    if system.folder is None:
        run_on_main(lambda: _take_predictions(system, about, section))
        return
    groups = plan_groups(
        utterances.numbers("duration_seconds"), run.score, num_groups=NUM_GROUPS, smallest=SMALLEST_GROUP
    )
    keys = section.keys
    group_keys = {number: [keys[place] for batch in group for place in batch] for number, group in enumerate(groups)}
    left = run_on_main(lambda: section.files.missing(system.name, about, group_keys))
    teachers = None
    if left and not system.is_teacher:
        # The first rank alone looks at what it was made from: that takes reading all weights.
        teacher_about = run_on_main(lambda: _about(run, teacher, teacher, section))
        teachers = section.files.read(teacher.name, teacher_about, utterances)
        assert teachers is not None, "the teacher answers first"
    own = left[world.rank :: world.world_size]
    if own:
        responses = None if teachers is None else [answer.token_ids for answer in teachers.answers]
        decoding = _Decoding(run, system, teacher, section, models, responses)
        with open_reader(run, section.test_set.folder) as reader:
            for number, answered in decoding.answers(groups, own, reader, world):
                section.files.write_group(system.name, about, number, answered)
    barrier()
    run_on_main(lambda: _gather(system, about, section, group_keys))


def _gather(system: System, about: str, section: Section, group_keys: dict[int, list[str]]) -> None:
    answered = section.files.gather(system.name, about, group_keys, section.keys)
    section.files.write(system.name, about, answered, section.test_set.utterances)
    log.info("event=answered section=%s system=%s utterances=%d", section.name, system.name, len(answered.answers))


class _Decoding:
    """One system on one section, on this rank."""

    def __init__(
        self,
        run: RunConfig,
        system: System,
        teacher: System,
        section: Section,
        models: _Models,
        responses: Sequence[Sequence[int]] | None,
    ) -> None:
        self._run, self._name, self._section = run, system.name, section
        utterances = section.test_set.utterances
        self._durations_U = utterances.numbers("duration_seconds")
        told = run.score.language == "manifest"
        self._languages = [language if told else None for language in utterances.texts("language")]
        self._keys = section.keys
        self._model = models.get(system)
        self._served_bytes = models.served_bytes[system.name]
        self._responses, self._pair = responses, None
        if responses is not None:
            self._pair = _paired(models.get(teacher), self._model, system)

    def answers(
        self, all_groups: Sequence[Group], own: Sequence[int], reader: Reader, world: World
    ) -> Iterator[tuple[int, Answered]]:
        """Number and answers of one of this rank's groups after the other."""
        decoder = GroupDecoder(self._model, self._run.score, self._durations_U, self._languages, all_groups)
        groups = {number: all_groups[number] for number in own}
        utterances = self._section.test_set.utterances
        wanted = ([utterances[place] for place in batch] for group in groups.values() for batch in group)
        loaded = mels_ahead(reader, wanted, self._model.extractor)
        progress = Progress("score")
        num_utterances = sum(len(batch) for group in groups.values() for batch in group)
        left = sum(float(self._durations_U[batch].sum()) for group in groups.values() for batch in group)
        for number, group in groups.items():
            begun = time.perf_counter()
            batches = [list(zip(batch, next(loaded), strict=True)) for batch in group]
            hypotheses = dict(decoder.decode(batches))
            seconds = time.perf_counter() - begun
            answers = [answer for batch in batches for answer in self._batch(batch, hypotheses)]
            yield number, Answered(answers=answers, seconds=seconds, served_bytes=self._served_bytes)
            fault_point("score.group", system=self._name, group=number)
            done = sum(float(self._durations_U[batch].sum()) for batch in group)
            left -= done
            progress.add(utterances=len(hypotheses), audio_seconds=done)
            is_last = progress.num_utterances == num_utterances
            progress.tell(left_seconds=lambda left=left: left * world.world_size, ranks=world.world_size, now=is_last)

    def _batch(self, batch: Sequence[tuple[int, Tensor]], hypotheses: dict[int, Hypothesis]) -> Iterator[Answer]:
        distances = self._distances(batch)
        for (place, _), (kl, agreements) in zip(batch, distances, strict=True):
            hypothesis = hypotheses[place]
            yield Answer(
                key=self._keys[place],
                text=hypothesis.text,
                language=hypothesis.language,
                ended_by=hypothesis.ended_by,
                token_ids=hypothesis.token_ids,
                kl=kl,
                agreements=agreements,
            )

    def _distances(self, batch: Sequence[tuple[int, Tensor]]) -> Sequence[tuple[float | None, int | None]]:
        """KL and agreements on the teacher's responses."""
        if self._pair is None or self._responses is None:
            return [(None, None)] * len(batch)
        examples = [
            Example(
                key=self._keys[place],
                mel_MF=mel_MF,
                response_ids=self._responses[place],
                prompt_language=self._languages[place],
            )
            for place, mel_MF in batch
        ]
        found = batch_distances(
            self._pair, collate(examples, prompt=self._model.prompt), chunk_rows=self._run.train.loss_chunk_rows
        )
        return list(zip(found.kl_U.tolist(), found.agreements_U.tolist(), strict=True))


def _paired(teacher: AsrModel, model: AsrModel, system: System) -> TeacherAndStudent | None:
    """Both models, to be compared token by token; None where their tokens are others."""
    if differing := vocabulary_difference(teacher, model):
        log.warning("event=no_kl system=%s reason='another %s than the teacher'", system.name, differing[0])
        return None
    share_if_equal(teacher, model)
    return join_models(teacher, model, DecoderStack(model.decoder.layers))


def _take_predictions(system: System, about: str, section: Section) -> None:
    path = system.predictions(section.test_set.name)
    found = read_predictions(path)
    if missing := [key for key in section.keys if key not in found]:
        raise ConfigError(
            f"{path} must have a line for each utterance of {section.test_set.name}, got none for {len(missing)} of "
            f"{len(section.keys)}, first {missing[0]}; its key, or the name of its audio file, must be that of the set"
        )
    answers = [
        Answer(key=key, text=found[key].text, language=_language(found[key].detected_language)) for key in section.keys
    ]
    section.files.write(system.name, about, Answered(answers=answers, seconds=None), section.test_set.utterances)


def _language(told: str | None) -> str | None:
    """By the model's name, if it is one of its languages; other systems write codes."""
    try:
        return language_name(told)
    except SourceError:
        return told


def _about(run: RunConfig, system: System, teacher: System, section: Section) -> str:
    """Fingerprint of all that decides a system's answers to a section."""
    told: dict[str, object] = {
        "system": system.fingerprint(section.test_set.name),
        "set": section.test_set.fingerprint,
    }
    if system.folder is not None:
        told |= {
            "audio_attention": section.audio_attention,
            "model": run.model.model_dump(mode="json", exclude={"path", "revision", "audio_attention"}),
            "decoding": decoding_settings(run),
            "arithmetic": None if system.is_teacher else run.score.arithmetic,
            "teacher": None if system.is_teacher else teacher.fingerprint(section.test_set.name),
            "chunk_rows": run.train.loss_chunk_rows,
        }
    return fingerprint(told)


def decoding_settings(run: RunConfig) -> dict[str, object]:
    """Prompt and batches: what all systems have in common."""
    return run.score.model_dump(mode="json", include=set(DecodingSection.model_fields))
