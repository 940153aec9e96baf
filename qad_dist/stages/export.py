"""export: the student as a folder that others load, reloaded in a fresh process before it counts."""

import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import AsrModel, state_hash
from qad_dist.asr.mel import log_mels
from qad_dist.asr.reference import load_with_qwen_asr, transcribe_with_qwen_asr
from qad_dist.asr.transcribe import transcribe
from qad_dist.config import RunConfig
from qad_dist.formats import FORMATS
from qad_dist.head import FrozenHead
from qad_dist.pairing import load_student, save_student
from qad_dist.quant.int8 import use_int8
from qad_dist.quant.state import (
    Quantization,
    check_quantizers,
    enable_checkpointing,
    quantizer_hash,
    read_quantization,
)
from qad_dist.runtime.reading import open_shards
from qad_dist.runtime.record import STUDENT, begin_stage, finish_stage, require_stage
from qad_dist.runtime.world import current_world, device_for
from qad_dist.text.usage import usage
from shards.errors import ModelError, WorldError
from shards.index import read_utterances
from shards.schema import TEST, Utterance
from shards.storage import folder_bytes, publish_folder, verify_manifest, write_json

log = logging.getLogger(__name__)

FRESH_PROCESS_SECONDS = 3600
MAX_RESPONSE_TOKENS = 256
_PROGRAM = "import sys; from qad_dist.stages.export import describe_export as f; f(sys.argv[1], sys.argv[2])"
LOGPROB_TOLERANCE = 0.05
"""In nats. Another process may choose other kernels, whose bf16 sums round differently: up to 0.035 was seen between
batches of other shapes of the embedded teacher. Without its quantizers half of its utterances differ by 0.13 or more.
"""


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
    folder = export_folder(run)
    unproven = folder.with_name(f".{folder.name}.unproven.tmp")
    try:
        expected = _write(run, unproven)
        results = {**_check(run, expected, unproven), "bytes": folder_bytes(unproven, suffixes=(".safetensors",))}
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
    _check(run, _answers(*_load_trained(run), run, _utterances(run)), export_folder(run))


def dry_run(run: RunConfig) -> None:
    """Say what would be written."""
    log.info("event=dry_run stage=export path=%s dtype=%s", export_folder(run), _dtype(run))


def export_folder(run: RunConfig) -> Path:
    """``<run>/export/<format>``."""
    return run.stage_folder("export") / run.export.format


def _dtype(run: RunConfig) -> str:
    return run.export.dtype or run.model.dtype


def _write(run: RunConfig, folder: Path) -> dict[str, Any]:
    """Write the student to ``folder``; what it answers is all that stays of it in memory."""
    student, quantization = _load_trained(run)
    save_student(student, quantization, folder, dtype=_dtype(run))
    return _answers(student, quantization, run, _utterances(run))


def _load_trained(run: RunConfig) -> tuple[AsrModel, Quantization]:
    folder = run.stage_folder("train") / STUDENT
    verify_manifest(folder)
    return load_student(run, folder, device_for(current_world()), dtype=_dtype(run))


def _utterances(run: RunConfig) -> list[Utterance]:
    """Utterances to compare on: of the test split if there is one, at equal distances by duration."""
    packed = run.stage_folder("pack")
    candidates = read_utterances(packed, splits=[TEST]) or read_utterances(packed)
    order = np.argsort(candidates.numbers("duration_seconds"), kind="stable")
    wanted = min(run.export.verify_utterances, len(candidates))
    return [candidates[order[i * (len(candidates) - 1) // max(1, wanted - 1)]] for i in range(wanted)]


def _check(run: RunConfig, expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load the folder in a fresh process, with qwen-asr's class and with ours, and compare with the student.

    Args:
        run: The run.
        expected: The student's :func:`_answers`. The student itself is gone: the fresh process needs its memory.
        folder: What was written.

    Raises:
        ModelError: The fresh process failed, or found other weights, quantizers or answers.
    """
    found = _in_fresh_process(run, folder, [key for key, *_ in expected["answers"]])
    expected |= {f"qwen_asr_{name}": expected[name] for name in ("quantizers", "state_sha256")}
    for name in expected:
        if name != "answers" and found[name] != expected[name]:
            raise _differs(folder, name, f"got {found[name]} for {expected[name]}")
    for (key, ids, logprobs), (_, found_ids, found_logprobs) in zip(expected["answers"], found["answers"], strict=True):
        if found_ids != ids:
            raise _differs(folder, f"tokens of {key}", "got others")
        apart = max(abs(a - b) for a, b in zip(logprobs, found_logprobs, strict=True))
        if apart > LOGPROB_TOLERANCE:
            raise _differs(folder, f"log-probabilities of {key}", f"got some {apart:.3g} apart")
    count = len(expected["answers"])
    log.info(
        "event=verified path=%s quantizers=%d equal_transcripts=%d/%d int8=%s qwen_asr=%r",
        *(folder, found["quantizers"], count, count, found["int8"], found["qwen_asr_text"]),
    )
    return {
        "quantizers": found["quantizers"],
        "quantizer_sha256": found["quantizer_sha256"],
        "state_sha256": found["state_sha256"],
        "equal_transcripts": count,
        "int8": found["int8"],
        "dtype": _dtype(run),
        "audio_attention": run.model.audio_attention,
    }


def _differs(folder: Path, what: str, got: str) -> ModelError:
    return ModelError(
        f"{folder} must have the {what} of the trained student, {got} in a fresh process; "
        "export again, and report this if it stays"
    )


def _in_fresh_process(run: RunConfig, folder: Path, keys: list[str]) -> dict[str, Any]:
    """What :func:`describe_export` finds; its messages go to ``<run>/export/verify.log``."""
    torch.cuda.empty_cache()  # what the student had
    log_path = run.stage_folder("export") / "verify.log"
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request.write_text(json.dumps({"run": run.model_dump(mode="json"), "folder": str(folder), "keys": keys}))
        with log_path.open("wb") as log_file:
            try:
                finished = subprocess.run(
                    [sys.executable, "-c", _PROGRAM, str(request), str(answer)],
                    stdout=log_file,
                    stderr=log_file,
                    timeout=FRESH_PROCESS_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as cause:
                raise ModelError(
                    f"{folder} must load and answer in a fresh process within {FRESH_PROCESS_SECONDS} s, got no end; "
                    f"see {log_path}"
                ) from cause
        if finished.returncode:
            last = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            got = last[0] if last else f"exit code {finished.returncode}"
            raise ModelError(f"{folder} must load in a fresh process, got: {got}; see {log_path}")
        return json.loads(answer.read_text())


def _answers(
    model: AsrModel, quantization: Quantization, run: RunConfig, utterances: list[Utterance]
) -> dict[str, Any]:
    """What a model is and what it says: its weights and quantizers, tokens and log-probabilities.

    Raises:
        ModelError: A log-probability is no finite number.
    """
    mels = log_mels(open_shards(run).read(utterances), model.extractor)
    hypotheses = transcribe(model, mels, max_response_tokens=MAX_RESPONSE_TOKENS)
    for utterance, hypothesis in zip(utterances, hypotheses, strict=True):
        if not all(map(math.isfinite, hypothesis.token_logprobs)):
            raise ModelError(
                f"{model.folder} must give finite log-probabilities, got some for {utterance.key} that are not; "
                "train again from an earlier checkpoint"
            )
    return {
        "quantizers": check_quantizers(model.model, quantization),
        "quantizer_sha256": quantizer_hash(model.model),
        "state_sha256": state_hash(model.model),
        "answers": [
            [utterance.key, list(hypothesis.token_ids), list(hypothesis.token_logprobs)]
            for utterance, hypothesis in zip(utterances, hypotheses, strict=True)
        ],
    }


def describe_export(request_path: str, answer_path: str) -> None:
    """In the fresh process: load an export as a user does, and write down what it is and says.

    Args:
        request_path: JSON with the resolved run, the export's folder and the keys of the utterances.
        answer_path: Receives the answers.
    """
    request = json.loads(Path(request_path).read_text())
    run, folder = RunConfig.model_validate(request["run"]), Path(request["folder"])
    keys = set(request["keys"])
    by_key = {u.key: u for u in read_utterances(run.stage_folder("pack")) if u.key in keys}
    utterances = [by_key[key] for key in request["keys"]]
    enable_checkpointing()
    (longest,) = open_shards(run).read(utterances[-1:])
    theirs = _described_by_qwen_asr(run, folder, longest)
    model, quantization = load_student(run, folder, device_for(current_world()), dtype=_dtype(run))
    ours = _answers(model, quantization, run, utterances)
    answers = {**ours, **theirs, "int8": _in_integers(model, quantization, run, utterances, ours["answers"])}
    Path(answer_path).write_text(json.dumps(answers))


def _described_by_qwen_asr(run: RunConfig, folder: Path, audio_A: np.ndarray) -> dict[str, Any]:
    user_model = load_with_qwen_asr(
        folder,
        dtype=getattr(torch, _dtype(run)),
        device=device_for(current_world()),
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    text, _ = transcribe_with_qwen_asr(user_model, audio_A)
    return {
        "qwen_asr_text": text,
        "qwen_asr_quantizers": check_quantizers(user_model.model, read_quantization(folder)),
        "qwen_asr_state_sha256": state_hash(user_model.model),
    }


@torch.no_grad()
def _in_integers(
    model: AsrModel, quantization: Quantization, run: RunConfig, utterances: list[Utterance], answers: list[Any]
) -> dict[str, Any] | None:
    """What changes when the Linears compute in integers, as a server does; None for formats that this project cannot.

    Its Linears are replaced, so this comes last.
    """
    recipe = FORMATS[quantization.format]
    if recipe.is_float or recipe.weight_scales != "channel" or recipe.input_scales == "none":
        return None
    mels = log_mels(open_shards(run).read(utterances), model.extractor)
    examples = [
        Example(key=key, mel_MF=mel_MF, response_ids=ids) for (key, ids, _), mel_MF in zip(answers, mels, strict=True)
    ]
    batch = collate(examples, prompt=model.prompt).to(model.device)
    embedded, head = embed(model, batch), FrozenHead(model.head_weight_VD)
    logits = []
    for is_int8 in (False, True):
        if is_int8:
            use_int8(model.decoder)
        states_RD = response_states(DecoderStack(model.decoder.layers), embedded, model.decoder.norm)
        logits.append(head(states_RD))
    hypotheses = transcribe(model, mels, max_response_tokens=MAX_RESPONSE_TOKENS)
    equal = [list(h.token_ids) == ids for h, (_, ids, _) in zip(hypotheses, answers, strict=True)]
    return {
        "largest_logit_difference": float((logits[0] - logits[1]).abs().max()),
        "largest_logit": float(logits[0].abs().max()),
        "equal_transcripts": sum(equal),
    }
