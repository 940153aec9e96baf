"""export: the student as a folder that others load, reloaded in a fresh process before it counts."""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from qad_dist.asr.load import AsrModel, load_model
from qad_dist.asr.reference import load_with_qwen_asr, transcribe_with_qwen_asr
from qad_dist.asr.save import save_checkpoint
from qad_dist.asr.transcribe import transcribe
from qad_dist.config import RunConfig
from qad_dist.quant.state import check_quantizers, enable_checkpointing, quantizer_hash
from qad_dist.runtime.record import STUDENT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import current_world, device_for
from qad_dist.text.usage import usage
from shards.errors import ModelError, WorldError
from shards.index import read_utterances
from shards.read import read_audio, read_many
from shards.schema import TEST, Utterance
from shards.storage import folder_bytes, publish_folder, verify_manifest, write_json

log = logging.getLogger(__name__)

FRESH_PROCESS_SECONDS = 3600
MAX_RESPONSE_TOKENS = 256


def run(run: RunConfig) -> None:
    """Write ``<run>/export/<format>`` and prove that it is the trained student.

    Raises:
        QadError: Training is not finished, or the reloaded folder differs from the student.
    """
    world = current_world()
    if world.world_size != 1:
        raise WorldError(f"export runs as one process, got {world.world_size}; start it with `python launch/export.py`")
    require_stage(run, "train")
    begin_stage(run, "export")
    student = _load_student(run)
    folder = export_folder(run)
    unproven = folder.with_name(f".{folder.name}.unproven.tmp")
    save_checkpoint(student.model, unproven, base=student.folder, dtype=_dtype(run))
    try:
        results = {**_check(run, student, unproven), "bytes": folder_bytes(unproven, suffixes=(".safetensors",))}
        publish_folder(unproven, folder)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    write_json(run.stage_folder("export") / "check.json", results)
    finish_stage(run, "export", results=results)
    log.info("event=finished stage=export path=%s bytes=%d", folder, results["bytes"])
    sys.stdout.write(usage(folder))
    sys.stdout.flush()


def verify(run: RunConfig) -> None:
    """Check an export again: its hashes, then the comparison with the student in a fresh process."""
    require_stage(run, "train")
    verify_manifest(export_folder(run))
    _check(run, _load_student(run), export_folder(run))


def dry_run(run: RunConfig) -> None:
    """Say what would be written."""
    log.info("event=dry_run stage=export path=%s dtype=%s", export_folder(run), _dtype(run))


def export_folder(run: RunConfig) -> Path:
    """``<run>/export/<format>``."""
    return run.stage_folder("export") / run.export.format


def _dtype(run: RunConfig) -> str:
    return run.export.dtype or run.model.dtype


def _load_student(run: RunConfig) -> AsrModel:
    folder = run.stage_folder("train") / STUDENT
    verify_manifest(folder)
    enable_checkpointing()
    student = load_model(
        folder,
        dtype=_dtype(run),
        audio_attention=run.model.audio_attention,
        device=device_for(current_world()),
        quantized=True,
    )
    check_quantizers(student.model, num_layers=len(student.decoder.layers))
    return student


def _utterances(run: RunConfig) -> list[Utterance]:
    """Utterances to compare on: of the test split if there is one, at equal distances by duration."""
    packed = read_utterances(run.stage_folder("pack"))
    candidates = [u for u in packed if u.split == TEST] or packed
    candidates.sort(key=lambda u: (u.duration_seconds, u.key))
    wanted = min(run.export.verify_utterances, len(candidates))
    return [candidates[i * (len(candidates) - 1) // max(1, wanted - 1)] for i in range(wanted)]


def _check(run: RunConfig, student: AsrModel, folder: Path) -> dict[str, Any]:
    """Load the folder in a fresh process, with qwen-asr's class and with ours, and compare with the student here."""
    utterances = _utterances(run)
    expected = _answers(student, run, utterances)
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request.write_text(
            json.dumps(
                {
                    "run": run.model_dump(mode="json"),
                    "folder": str(folder),
                    "keys": [utterance.key for utterance in utterances],
                }
            )
        )
        program = "import sys; from qad_dist.stages.export import describe_export as f; f(sys.argv[1], sys.argv[2])"
        finished = subprocess.run(
            [sys.executable, "-c", program, str(request), str(answer)],
            capture_output=True,
            text=True,
            timeout=FRESH_PROCESS_SECONDS,
            check=False,
        )
        if finished.returncode:
            last = finished.stderr.strip().splitlines()[-1:]
            raise ModelError(f"{folder} must load in a fresh process, got: {' '.join(last)}; see the training log")
        found = json.loads(answer.read_text())
    expected |= {f"qwen_asr_{name}": expected[name] for name in ("quantizers", "quantizer_sha256")}
    for name in expected:
        if found[name] != expected[name]:
            raise ModelError(
                f"{folder} must have the {name} of the trained student, got others in a fresh process; "
                "export again, and report this if it stays"
            )
    log.info(
        "event=verified path=%s quantizers=%d equal_transcripts=%d/%d qwen_asr=%r",
        *(folder, found["quantizers"], len(utterances), len(utterances), found["qwen_asr_text"]),
    )
    return {
        "quantizers": found["quantizers"],
        "quantizer_sha256": found["quantizer_sha256"],
        "equal_transcripts": len(utterances),
        "dtype": _dtype(run),
        "audio_attention": run.model.audio_attention,
    }


def _answers(model: AsrModel, run: RunConfig, utterances: list[Utterance]) -> dict[str, Any]:
    """What a model says, exactly: tokens and log-probabilities, and its quantizers."""
    audios = read_many(run.stage_folder("pack"), utterances)
    hypotheses = transcribe(model, audios, max_response_tokens=MAX_RESPONSE_TOKENS)
    return {
        "quantizers": check_quantizers(model.model, num_layers=len(model.decoder.layers)),
        "quantizer_sha256": quantizer_hash(model.model),
        "token_ids": [list(hypothesis.token_ids) for hypothesis in hypotheses],
        "token_logprobs": [list(hypothesis.token_logprobs) for hypothesis in hypotheses],
    }


def describe_export(request_path: str, answer_path: str) -> None:
    """In the fresh process: load an export as a user does, and write down what it says.

    Args:
        request_path: JSON with the resolved run, the export's folder and the keys of the utterances.
        answer_path: Receives the answers.
    """
    request = json.loads(Path(request_path).read_text())
    run, folder = RunConfig.model_validate(request["run"]), Path(request["folder"])
    by_key = {utterance.key: utterance for utterance in read_utterances(run.stage_folder("pack"))}
    utterances = [by_key[key] for key in request["keys"]]
    enable_checkpointing()
    user_model = load_with_qwen_asr(
        folder,
        dtype=getattr(torch, _dtype(run)),
        device=device_for(current_world()),
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    longest = read_audio(run.stage_folder("pack"), utterances[-1])
    text, _ = transcribe_with_qwen_asr(user_model, longest)
    model = load_model(
        folder,
        dtype=_dtype(run),
        audio_attention=run.model.audio_attention,
        device=device_for(current_world()),
        quantized=True,
    )
    answers = {
        **_answers(model, run, utterances),
        "qwen_asr_text": text,
        "qwen_asr_quantizers": check_quantizers(user_model.model, num_layers=len(model.decoder.layers)),
        "qwen_asr_quantizer_sha256": quantizer_hash(user_model.model),
    }
    Path(answer_path).write_text(json.dumps(answers))
