"""Can this machine run this config with this model? What a user runs first with the real checkpoint.

Every assumption that this project makes of the machine and of the checkpoint is compared with the thing itself, and
with what qwen-asr makes of it. Each answer is one line, ``ok``, ``warn`` or ``fail``; nothing is written or changed.

Nothing heavy is imported before it is known to load here.
"""

import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qad_dist.config import RunConfig
from qad_dist.runtime import machine
from qad_dist.runtime.estimate import disk_of_stages, model_size
from qad_dist.runtime.machine import FAIL, OK, WARN, Finding, guarded
from qad_dist.runtime.world import current_world, device_for
from qad_dist.runtime.zero import zero_stage
from shards.errors import AudioError, ModelError
from shards.schema import SAMPLE_RATE_HZ, Recording
from shards.storage import read_json

if TYPE_CHECKING:
    import numpy as np

RECORDINGS_TRIED = 20
"""For one that can be transcribed."""


def run(run: RunConfig) -> None:
    """Look at everything and say what was found, line by line.

    Raises:
        ModelError: Something failed; its lines are on stdout.
    """
    findings = []
    for finding in _look(run):
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
        findings.append(finding)
    if num_failed := sum(finding.level == FAIL for finding in findings):
        raise ModelError(
            f"{run.model.path} and this machine must pass every check, got {num_failed} of {len(findings)} failed; "
            "mend what the lines marked fail say"
        )


def dry_run(run: RunConfig) -> None:
    """Say what would be looked at; no package, model or audio is loaded."""
    sys.stdout.write(
        f"machine: pinned versions; {', '.join(machine.IMPORTS)} import in a fresh process; GPUs; "
        f"{run.folder} can be written to and has space; train.deepspeed names a ZeRO stage, or none\n"
        f"model {run.model.path}: files; every weight of its config; 7 Linear layers in each decoder layer; tied head; "
        "token ids; chat template\n"
        "against qwen-asr: prompt, log-mel and number of audio tokens for short and long utterances; "
        f"one transcript of {run.pack.inputs[0]} in float32\n"
    )


def _look(run: RunConfig) -> Iterator[Finding]:
    yield from machine.check_packages()
    loads = True
    for finding in machine.check_imports():
        loads &= finding.level != FAIL
        yield finding
    yield from machine.check_folder(run.folder)
    yield from guarded("deepspeed", _deepspeed_file(run))
    if not loads:
        yield Finding(WARN, "model", "not looked at, since packages that it needs do not load")
        return
    yield from machine.check_processors(dtype=run.model.dtype)
    yield from guarded("model", _model(run))


def _deepspeed_file(run: RunConfig) -> Iterator[Finding]:
    stage = zero_stage(run.train.deepspeed)
    yield Finding(OK, "deepspeed", f"{run.train.deepspeed}: ZeRO-{stage}" if stage else "not used: nothing is sharded")


def _model(run: RunConfig) -> Iterator[Finding]:
    from qad_dist.asr.load import resolve_model_folder
    from qad_dist.asr.verify import verify_model, verify_transcript

    folder = resolve_model_folder(run.model.path, run.model.revision)
    is_sound = True
    for finding in verify_model(folder):
        is_sound &= finding.level != FAIL
        yield finding
    yield from guarded("disk", _disk(run, folder))
    if not is_sound:
        yield Finding(WARN, "transcript", "not compared, since the model failed above")
        return
    key, audio_A = _utterance(run)
    yield from verify_transcript(
        *(folder, key, audio_A),
        max_response_tokens=run.label.max_response_tokens,
        device=device_for(current_world()),
    )


def _disk(run: RunConfig, folder: Path) -> Iterator[Finding]:
    sizes = disk_of_stages(run, model_size(read_json(folder / "config.json")), hours=None)
    known = {stage: size for stage, size in sizes.items() if size is not None}
    what = f"{', '.join(known)} (audio comes on top)"
    yield from machine.check_disk(run.folder, need_bytes=round(sum(known.values())), what=what)


def _utterance(run: RunConfig) -> tuple[str, "np.ndarray"]:
    """Key and audio of one utterance: a packed one if there are any, else from the first input that ``pack`` reads."""
    from qad_dist.runtime.reading import open_shards
    from shards.index import INDEX, read_utterances

    packed = run.stage_folder("pack")
    if (packed / INDEX).is_file() and len(utterances := read_utterances(packed)):
        return utterances[0].key, open_shards(run).read(utterances[:1])[0]
    return _recording(run)


def _recording(run: RunConfig) -> tuple[str, "np.ndarray"]:
    from shards.corpus import recording_of
    from shards.sources import read_found

    pack, reasons = run.pack, []
    with tempfile.TemporaryDirectory() as spool:
        found = read_found(pack.inputs[:1], default_language=pack.language, kind=pack.source, spool=Path(spool))
        for recording in map(recording_of, islice(found, RECORDINGS_TRIED)):
            try:
                return recording.key, _beginning(recording, run)
            except AudioError as error:
                reasons.append(f"{recording.path}: {error}")
    raise AudioError(
        f"{pack.inputs[0]} must hold an utterance to transcribe among its first {len(reasons)} recordings, "
        f"got none; the first reason is {reasons[0]}"
    )


def _beginning(recording: Recording, run: RunConfig) -> "np.ndarray":
    """Of a recording as much as an utterance may have.

    Raises:
        AudioError: There is no utterance in it.
    """
    import numpy as np

    from shards.audio import read_recording

    pack = run.pack
    most = pack.max_audio_seconds if pack.long_recordings == "reject" else pack.max_recording_hours * 3600
    blocks, missing = [], round(pack.max_audio_seconds * SAMPLE_RATE_HZ)
    for block_A in read_recording(recording, min_seconds=pack.min_audio_seconds, max_seconds=most):
        blocks.append(block_A[:missing])
        missing -= len(blocks[-1])
        if not missing:
            break
    return np.concatenate(blocks)
