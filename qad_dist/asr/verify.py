"""Whether a checkpoint is what this project takes it for: each assumption against the files and against qwen-asr.

Nothing is changed, and a mismatch is no exception but a finding, so that one look names all of them.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qad_dist.asr import audio_tower, checkpoint, mel, reference
from qad_dist.asr.load import MODELOPT_STATE, load_model
from qad_dist.asr.prompt import Prompt
from qad_dist.asr.transcribe import transcribe
from qad_dist.linears import LINEARS
from qad_dist.runtime.machine import FAIL, OK, WARN, Finding, guarded
from shards.schema import ENDED_BY_END_TOKEN, SAMPLE_RATE_HZ
from shards.storage import read_json

SHORT_SAMPLES = SAMPLE_RATE_HZ // 10
"""A tenth of a second."""

# Below half a second, below one (one chunk of the tower), whole and broken seconds, beyond a window of 8 s.
DURATIONS_SECONDS = (0.1, 0.49, 0.5, 0.73, 0.99, 1.0, 1.004, 2.5, 7.995, 8.0, 12.34, 30.0)
LONGEST_FRAMES = 12_000
"""Two minutes of mel frames: the audio token formula is compared for every length up to it."""

LOG_MEL_TOLERANCE = 1e-5
"""Between our log-mel and the processor's: the order of float32 sums; 1.2e-7 was seen."""

# Beyond our own response: enough to see a model that goes on where we stopped.
TOKENS_AFTER_END = 8

_NOT_SUPPORTED = "this architecture is not supported"


def verify_model(folder: Path) -> Iterator[Finding]:
    """Compare everything that can be compared without running the model.

    Args:
        folder: From :func:`qad_dist.asr.load.resolve_model_folder`.

    Raises:
        ModelError: The config cannot be read, so that there is nothing to compare with.
    """
    yield from _files(folder)
    config = checkpoint.load_config(folder)
    yield from guarded("decoder", _decoder(config))
    yield from guarded("audio tower", _audio_tower(config))
    yield from guarded("weights", _weights(folder, config))
    yield from guarded("processor", _processor(folder, config))


def verify_transcript(
    folder: Path, key: str, audio_A: np.ndarray, *, max_response_tokens: int, device: torch.device
) -> Iterator[Finding]:
    """Transcribe one utterance by this project and by qwen-asr, in float32, attention over the whole utterance.

    Args:
        folder: A checkpoint that :func:`verify_model` found nothing wrong with.
        key: Names the utterance in the findings.
        audio_A: float32 mono at 16 kHz.
        max_response_tokens: Limit of our own response.
        device: Where to compute.
    """
    model = load_model(folder, dtype="float32", audio_attention="full", device=device)
    (ours,) = transcribe(model, [mel.log_mel(audio_A, model.extractor)], max_response_tokens=max_response_tokens)
    del model  # two float32 copies of a large checkpoint need not fit
    ended = ours.ended_by == ENDED_BY_END_TOKEN
    text, language = reference.reference_transcript(
        folder, audio_A, max_response_tokens=len(ours.token_ids) + (TOKENS_AFTER_END if ended else 0), device=device
    )
    if not ended:
        told = f"{key} got no end token within {max_response_tokens} tokens (label.max_response_tokens); is it speech?"
        yield Finding(WARN, "transcript", told)
    mine, theirs = f"{ours.language}: {ours.text!r}", f"{language}: {text!r}"
    if mine != theirs:
        yield Finding(FAIL, "transcript", f"of {key} must be qwen-asr's {theirs}, got {mine}; report this as a bug")
    else:
        yield Finding(OK, "transcript", f"of {key} equals qwen-asr's: {mine}")


def _files(folder: Path) -> Iterator[Finding]:
    if missing := checkpoint.missing_files(folder):
        text = f"{folder} must hold {', '.join(missing)}, got none of that name; copy the whole checkpoint"
        yield Finding(FAIL, "model files", text)
    if (folder / MODELOPT_STATE).exists():
        text = (
            f"model.path must be a full-precision checkpoint, got {folder} with {MODELOPT_STATE}; name the base model"
        )
        yield Finding(FAIL, "model files", text)


def _decoder(config: Any) -> Iterator[Finding]:
    found, expected = reference.decoder_linears(reference.empty_model(config)), reference.expected_linears(config)
    layers = config.thinker_config.text_config.num_hidden_layers
    if found == expected:
        weights = sum(outputs * inputs for outputs, inputs in found.values())
        text = f"{len(found)} Linear layers, {len(LINEARS)} in each of {layers} layers"
        yield Finding(OK, "decoder", f"{text}, {weights / 1e6:,.1f} M weights")
        return
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    text = (
        f"must have the {len(LINEARS)} known Linear layers in each of {layers} layers ({len(expected)}), "
        f"got {len(found)}, {len(names)} of other name or shape, first {names[0]}; {_NOT_SUPPORTED}"
    )
    yield Finding(FAIL, "decoder", text)


def _audio_tower(config: Any) -> Iterator[Finding]:
    audio, width = config.thinker_config.audio_config, config.thinker_config.text_config.hidden_size
    wrong = []
    if 2 * audio.n_window != audio_tower.CHUNK_FRAMES:
        wrong.append(f"n_window must be {audio_tower.CHUNK_FRAMES // 2}, got {audio.n_window}")
    if audio.n_window_infer <= 0 or audio.n_window_infer % audio_tower.CHUNK_FRAMES:
        wrong.append(f"n_window_infer must be a multiple of {audio_tower.CHUNK_FRAMES}, got {audio.n_window_infer}")
    if audio.output_dim != width:
        wrong.append(f"output_dim must be the decoder's hidden_size ({width}), got {audio.output_dim}")
    for rule in wrong:
        yield Finding(FAIL, "audio tower", f"audio_config.{rule}; {_NOT_SUPPORTED}")
    if not wrong:
        text = f"{audio.encoder_layers} layers, windows of {audio.n_window_infer} frames, not quantized, not trained"
        yield Finding(OK, "audio tower", text)


def _weights(folder: Path, config: Any) -> Iterator[Finding]:
    """Names and shapes of the stored tensors against the config; the head must be the embedding."""
    stored = checkpoint.stored_shapes(folder)
    needed = {name: tuple(weight.shape) for name, weight in reference.empty_model(config).named_parameters()}
    needed.pop(checkpoint.HEAD, None)  # a tied head is stored once or twice
    wrong = sorted(name for name, shape in needed.items() if stored.get(name) != shape)
    if wrong:
        first = f"{wrong[0]} {stored.get(wrong[0], 'missing')} instead of {needed[wrong[0]]}"
        text = (
            f"{folder} must hold every weight of its config, got {len(wrong)} missing or of other shape, first {first}"
        )
        yield Finding(FAIL, "weights", text)
    unknown = sorted(stored.keys() - needed.keys() - {checkpoint.HEAD})
    if used := [name for name in unknown if name.startswith(checkpoint.USED_PARTS)]:
        text = (
            f"{folder} must hold no weight that its config has no place for, got {len(used)}, first {used[0]}; "
            "copy all files of one checkpoint"
        )
        yield Finding(FAIL, "weights", text)
    elif unknown:
        text = f"{len(unknown)} stored weights have no place in the model, first {unknown[0]}; they are ignored"
        yield Finding(WARN, "weights", text)
    if not wrong:
        num_weights = sum(map(math.prod, needed.values()))
        yield Finding(OK, "weights", f"{len(needed)} tensors, {num_weights / 1e6:,.1f} M weights")
    if (head := checkpoint.stored_head(folder)) == "own":
        text = "lm_head must be tied to the embedding, got other weights; this project shares one tensor for both"
        yield Finding(FAIL, "weights", text)
        return
    yield Finding(OK, "weights", f"lm_head is tied to the embedding (stored {head})")


def _processor(folder: Path, config: Any) -> Iterator[Finding]:
    processor = checkpoint.load_processor(folder)
    yield from guarded("tokens", _tokens(folder, processor.tokenizer, config))
    for finding in guarded("chat template", _template(processor)):
        yield finding
        if finding.level == FAIL:
            return
    yield from guarded("prompt", _prompt(processor, config.thinker_config.audio_config.num_mel_bins))


def _tokens(folder: Path, tokenizer: Any, config: Any) -> Iterator[Finding]:
    wrong = []
    ids = {token: tokenizer(token)["input_ids"] for token in reference.SPECIAL_TOKENS}
    for token, found in ids.items():
        if len(found) != 1:
            wrong.append(f"{token} must be one token, got ids {found}")
    largest, vocabulary = max(tokenizer.get_vocab().values()), config.thinker_config.text_config.vocab_size
    if largest >= vocabulary:
        wrong.append(f"vocab_size must be above the tokenizer's largest id ({largest}), got {vocabulary}")
    end = ids[reference.END_TOKEN][0]
    if tokenizer.eos_token_id != end:
        rule = f"eos_token must be {reference.END_TOKEN} ({end})"
        wrong.append(f"{rule}, got {tokenizer.eos_token} ({tokenizer.eos_token_id})")
    wrong += _end_ids(folder / "generation_config.json", end)
    for setting, token in (
        ("audio_token_id", reference.AUDIO_TOKEN),
        ("audio_start_token_id", "<|audio_start|>"),
        ("audio_end_token_id", "<|audio_end|>"),
    ):
        if [value := getattr(config.thinker_config, setting, None)] != ids[token]:
            wrong.append(f"thinker_config.{setting} must be the id of {token} ({ids[token][0]}), got {value}")
    if tokenizer.decode(ids[reference.TEXT_TAG], skip_special_tokens=True) != reference.TEXT_TAG:
        wrong.append(f"{reference.TEXT_TAG} must survive decoding, got a special token that is left out")
    for rule in wrong:
        yield Finding(FAIL, "tokens", f"{rule}; copy config and tokenizer files of one checkpoint")
    if not wrong:
        named = ", ".join(f"{token} {found[0]}" for token, found in ids.items())
        yield Finding(OK, "tokens", f"{named}; {vocabulary:,} in the vocabulary")


def _end_ids(path: Path, end: int) -> list[str]:
    """What is wrong with the end ids of a generation config, if there is one."""
    if not path.is_file():
        return []
    values = read_json(path)
    found = values.get("eos_token_id", end) if isinstance(values, dict) else values
    if end in (found if isinstance(found, list) else [found]):
        return []
    return [f"{path.name}: eos_token_id must hold the end token's id {end}, got {found}"]


def _template(processor: Any) -> Iterator[Finding]:
    if (text := reference.prompt_text(processor)) != reference.PROMPT_TEXT:
        text = f"must render {reference.PROMPT_TEXT!r}, got {text!r}; copy the base model's template"
        yield Finding(FAIL, "chat template", text)
    else:
        yield Finding(OK, "chat template", "renders the prompt that the model was trained on")


def _prompt(processor: Any, num_mel_bins: int) -> Iterator[Finding]:
    """Our prompt, log-mel and token counts against qwen-asr's processor, which must suit the audio tower."""
    if mismatches := mel.extractor_mismatches(processor.feature_extractor, num_mel_bins):
        for rule in mismatches:
            yield Finding(FAIL, "prompt", f"preprocessor_config.json: {rule}; copy the base model's files again")
        return
    prompt = Prompt.from_processor(processor)
    noise = np.random.default_rng(0)
    wrong = []
    for seconds in DURATIONS_SECONDS:
        audio_A = noise.normal(0, 0.1, round(seconds * SAMPLE_RATE_HZ)).astype(np.float32)
        expected = reference.reference_inputs(processor, audio_A)
        mel_MF = mel.log_mel(audio_A, processor.feature_extractor)
        if mel_MF.shape != expected.mel_MF.shape:
            rule = f"log-mel of {seconds} s must have the shape of qwen-asr's {tuple(expected.mel_MF.shape)}"
            wrong.append(f"{rule}, got {tuple(mel_MF.shape)}")
        elif not (apart := float((mel_MF - expected.mel_MF).abs().max())) <= LOG_MEL_TOLERANCE:
            wrong.append(f"log-mel of {seconds} s must equal qwen-asr's to {LOG_MEL_TOLERANCE}, got some {apart} apart")
        ids = prompt.build(audio_tower.num_audio_tokens(mel.num_frames(len(audio_A))))
        if ids != expected.input_ids:
            rule = f"prompt of {seconds} s must equal qwen-asr's ({len(expected.input_ids)} ids)"
            wrong.append(f"{rule}, got {len(ids)} ids, the same up to {_common_length(ids, expected.input_ids)}")
    frames = torch.arange(1, LONGEST_FRAMES + 1)
    ours = torch.tensor([audio_tower.num_audio_tokens(int(num_frames)) for num_frames in frames])
    if len(unequal := (ours != reference.reference_audio_tokens(frames)).nonzero()):
        first = int(frames[unequal[0]])
        wrong.append(f"audio tokens must equal qwen-asr's for every length, got another number at {first} frames")
    for rule in wrong:
        yield Finding(FAIL, "prompt", f"{rule}; this version of qwen-asr or its preprocessor is not supported")
    if not wrong:
        text = f"ids and log-mel equal qwen-asr's for {len(DURATIONS_SECONDS)} durations, audio tokens for every length"
        yield Finding(OK, "prompt", text)
    if (length := reference.padded_length(SHORT_SAMPLES)) != SHORT_SAMPLES:
        text = (
            f"an utterance of {SHORT_SAMPLES} samples must reach the model as it is, got {length} samples from this "
            "version of qwen-asr; transcripts of short utterances may differ from its own"
        )
        yield Finding(WARN, "prompt", text)


def _common_length(first: list[int], second: list[int]) -> int:
    """Leading ids that are equal."""
    pairs = zip(first, second, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
