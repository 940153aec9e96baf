"""The embedded teacher for tests: loaded by this project, loaded by qwen-asr alone, and small relatives of it.

What is compared with never runs this project's prompt, mel, packing, audio tower or decoding.
"""

import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from qwen_asr import Qwen3ASRModel
from torch import Tensor
from transformers import AutoConfig, AutoModel

from qad_dist.asr.load import PROCESSOR_FILES, AsrModel, load_model
from qad_dist.asr.mel import log_mel

Samples = npt.NDArray[np.float32]

ASSETS = Path(__file__).parents[1] / "assets"
NANO = ASSETS / "nano-teacher"
SAMPLE_RATE_HZ = 16_000


def load(folder: Path = NANO, *, dtype: str = "float32", audio_attention: str = "windowed", **kwargs: Any) -> AsrModel:
    """Load as the stages do, on the CPU."""
    return load_model(folder, dtype=dtype, audio_attention=audio_attention, device=torch.device("cpu"), **kwargs)


def load_reference(folder: Path = NANO) -> Any:
    """qwen-asr's model in float32 as it is: transformers' SDPA, its own audio tower."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def digits(count: int) -> list[Samples]:
    """``count`` clips of spoken digits, over all languages."""
    return [soundfile.read(ASSETS / "digits" / entry["audio"], dtype="float32")[0] for entry in digit_entries(count)]


def digit_entries(count: int) -> list[dict[str, str]]:
    """The manifest's lines of :func:`digits`: ``text`` and ``language``."""
    lines = (ASSETS / "digits" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // count]) for i in range(count)]


def mels_of(model: AsrModel, audios: Sequence[Samples]) -> list[Tensor]:
    """Log-mels by the model's extractor."""
    return [log_mel(audio, model.extractor) for audio in audios]


def noise(num_samples: int, *, seed: int) -> Samples:
    """Noise with a slow swell: no second of it equals another."""
    random = np.random.default_rng(seed)
    swell = 0.05 + 0.05 * np.sin(np.arange(num_samples) / SAMPLE_RATE_HZ * 2)
    return (random.normal(0, 1, num_samples) * swell).astype(np.float32)


def digit_mixes(seconds: Sequence[float]) -> list[Samples]:
    """Clips of these lengths: spoken digits of all languages one behind the other, with pauses between them."""
    random = np.random.default_rng(0)
    spoken = iter(digits(sum(round(length) for length in seconds)))
    mixes = []
    for length in seconds:
        mix_A, filled = noise(round(length * SAMPLE_RATE_HZ), seed=0) * 1e-3, 0
        while filled < len(mix_A):
            one_A = next(spoken)[: len(mix_A) - filled]
            mix_A[filled : filled + len(one_A)] += one_A
            filled += len(one_A) + int(random.uniform(0.1, 0.4) * SAMPLE_RATE_HZ)
        mixes.append(mix_A)
    return mixes


@contextmanager
def windows(reference: Any) -> Generator[Any]:
    """qwen-asr's model with the mask that its audio tower computes itself and, under SDPA, forgets to hand on."""
    tower = reference.thinker.audio_tower

    def add_mask(_: Any, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Any:
        hidden, cu_seqlens = args
        return args, {**kwargs, "attention_mask": tower._prepare_attention_mask(hidden, cu_seqlens)}

    hooks = [layer.register_forward_pre_hook(add_mask, with_kwargs=True) for layer in tower.layers]
    try:
        yield reference
    finally:
        for hook in hooks:
            hook.remove()


def reference_inputs(
    model: AsrModel, audio_A: Samples, *, context: str = "", language: str | None = None
) -> dict[str, Tensor]:
    """The processor's inputs for one clip, with the prompt of qwen-asr's ``transcribe``."""
    wrapper = Qwen3ASRModel(backend="transformers", model=torch.nn.Linear(1, 1), processor=model.processor)
    text = wrapper._build_text_prompt(context, language)
    return model.processor(text=[text], audio=[audio_A], return_tensors="pt", padding=True)


@torch.no_grad()
def reference_response_logits(
    reference: Any, model: AsrModel, audio_A: Samples, response_ids: Sequence[int], **prompt: Any
) -> Tensor:
    """``[R, V]``: qwen-asr's unpacked forward pass over prompt and response, at the rows that predict the response."""
    inputs = reference_inputs(model, audio_A, **prompt)
    prompt_length = inputs["input_ids"].shape[1]
    ids_1T = torch.cat([inputs["input_ids"], torch.tensor([list(response_ids)])], dim=1)
    logits_1TV = reference.thinker(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        input_features=inputs["input_features"],
        feature_attention_mask=inputs["feature_attention_mask"],
    ).logits
    return logits_1TV[0, prompt_length - 1 : -1]


@torch.no_grad()
def reference_tokens(
    reference: Any, model: AsrModel, audio_A: Samples, *, max_new_tokens: int, **prompt: Any
) -> list[int]:
    """qwen-asr's greedy response to one clip, cut behind the first end token."""
    inputs = reference_inputs(model, audio_A, **prompt)
    end_id = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    sequences = reference.generate(
        **inputs, max_new_tokens=max_new_tokens, eos_token_id=end_id, pad_token_id=end_id
    ).sequences
    tokens = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens[: tokens.index(end_id) + 1] if end_id in tokens else tokens


def write_random_model(folder: Path, *, seed: int = 0, audio: dict[str, Any] | None = None, **text: Any) -> Path:
    """A checkpoint of random float32 weights with the embedded teacher's tokenizer and, unless told, audio tower.

    Args:
        folder: Made here.
        seed: Of the weights.
        audio: Settings of the audio tower that differ from the embedded teacher's.
        text: Settings of the decoder that differ from the embedded teacher's, e.g. ``num_hidden_layers=1``.
    """
    folder.mkdir(parents=True)
    for name in PROCESSOR_FILES:
        if (NANO / name).is_file():
            shutil.copyfile(NANO / name, folder / name)
    values = json.loads((NANO / "config.json").read_text())
    values["thinker_config"]["text_config"] |= text
    values["thinker_config"]["audio_config"] |= audio or {}
    values["thinker_config"]["audio_config"]["output_dim"] = values["thinker_config"]["text_config"]["hidden_size"]
    (folder / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32)
    model.thinker.lm_head.weight = model.thinker.model.embed_tokens.weight
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder
