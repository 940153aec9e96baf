import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from qad_dist.config import RunConfig
from qad_dist.runtime import machine
from qad_dist.stages import check
from shards.errors import ModelError
from shards.schema import SAMPLE_RATE_HZ, Recording
from tests.helpers.packing import pack_tones

if TYPE_CHECKING:
    from qad_dist.asr.collate import Example
    from qad_dist.asr.prompt import Prompt
    from qad_dist.batch import Batch

ASSETS = Path(__file__).parents[1] / "assets"
DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "nano-teacher", tmp_path / "teacher", copy_function=shutil.copy))


@pytest.fixture
def loads_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the fresh process that imports all packages; the first test does not use this."""
    monkeypatch.setattr(machine, "check_imports", lambda: iter([machine.Finding(machine.OK, "imports", "spared")]))


def run_config(folder: Path, model: Path, **settings: Any) -> RunConfig:
    inputs = folder / "recordings"
    inputs.mkdir(exist_ok=True)
    shutil.copy(ASSETS / "digits" / json.loads(_first_line())["audio"], inputs)
    values = {"run": str(folder / "run"), "model": {"path": str(model)}, "pack": {"inputs": [str(inputs)]}}
    return RunConfig.model_validate({**values, "train": {"deepspeed": str(DEEPSPEED)}, **settings})


def _first_line() -> str:
    return (ASSETS / "digits" / "manifest.jsonl").read_text().splitlines()[0]


FIRST_TEXT: str = json.loads(_first_line())["text"]
"""What the first recording says; the teacher and qwen-asr hear it alike."""


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def failures(run: RunConfig, output: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of the failed checks of a run that must fail; their number is in the error."""
    with pytest.raises(ModelError, match="must pass every check") as caught:
        check.run(run)
    lines = [line for line in output.readouterr().out.splitlines() if line.startswith("fail")]
    assert f"got {len(lines)} of " in str(caught.value)
    return lines


def test_check_passes_on_the_embedded_teacher_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_config(tmp_path, ASSETS / "nano-teacher")

    check.run(run)

    lines = capsys.readouterr().out.splitlines()
    subjects = {line[6:].split(":")[0] for line in lines if line.startswith("ok")}
    assert subjects >= {
        *("packages", "imports", "run folder", "deepspeed", "decoder", "audio tower", "weights", "tokens"),
        *("chat template", "prompt", "disk", "transcript"),
    }
    assert any("21 Linear layers, 7 in each of 3 layers" in line for line in lines)
    assert any(f"{FIRST_TEXT!r}" in line for line in lines if "transcript" in line)
    assert not Path(run.run).exists()


@pytest.mark.usefixtures("loads_everything")
def test_check_takes_a_packed_utterance_when_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_config(tmp_path, ASSETS / "nano-teacher")
    (path,) = (tmp_path / "recordings").iterdir()
    recording = Recording(path=str(path), key="packed-utterance", source="digits")
    pack_tones([recording], run.stage_folder("pack"))
    shutil.rmtree(tmp_path / "recordings")

    check.run(run)

    assert f"transcript: of packed-utterance equals qwen-asr's: English: {FIRST_TEXT!r}" in capsys.readouterr().out


def _end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda values: values.update(eos_token="<|endoftext|>"))
    edit(folder / "special_tokens_map.json", lambda values: values.update(eos_token="<|endoftext|>"))


def _generation_end(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda values: values.update(eos_token_id=[151645, 151643]))


def _template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant\n", "<|im_start|>assistant:\n"))


def _broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{%- for m in messages -%}")


def _quantized(folder: Path) -> None:
    (folder / "modelopt_state.pth").write_bytes(b"state")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _smaller_vocabulary(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"]["text_config"].update(vocab_size=1000))


def _audio_token(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"].update(audio_token_id=151676))


def _deeper(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"]["text_config"].update(num_hidden_layers=4))


def _window(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"]["audio_config"].update(n_window=100))


def _other_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')


def _untied(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["thinker.lm_head.weight"] = tensors["thinker.model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _shallower(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"]["text_config"].update(num_hidden_layers=2))


def _no_rope(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"]["text_config"].update(rope_scaling=None))


def _text_heads(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["thinker_config"]["text_config"].update(num_attention_heads=0))


def _replaced(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.usefixtures("loads_everything")
@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_end_token, "tokens: eos_token must be <|im_end|> (1017), got <|endoftext|> (1018)"),
        (
            _generation_end,
            "generation_config.json: eos_token_id must hold the end token's id 1017, got [151645, 151643]",
        ),
        (_template, "chat template: must render '<|im_start|>system"),
        (
            _broken_template,
            "the chat template must render a prompt, got: TemplateSyntaxError: Unexpected end of template",
        ),
        (_quantized, "model.path must be a full-precision checkpoint, got "),
        (_without("preprocessor_config.json"), "must hold preprocessor_config.json, got none"),
        (_without("chat_template.jinja"), "must hold chat_template.jinja or chat_template.json, got none"),
        (_without("model.safetensors"), "must hold model.safetensors or model.safetensors.index.json, got none"),
        (_without("config.json"), "model.path must be a folder with config.json"),
        (_smaller_vocabulary, "vocab_size must be above the tokenizer's largest id (1023), got 1000"),
        (_smaller_vocabulary, "first thinker.model.embed_tokens.weight (1024, 128) instead of (1000, 128)"),
        (_audio_token, "thinker_config.audio_token_id must be the id of <|audio_pad|> (1022), got 151676"),
        (
            _deeper,
            "must hold every weight of its config, got 11 missing or of other shape, first thinker.model.layers.3.",
        ),
        (_shallower, "no weight that its config has no place for, got 11, first thinker.model.layers.2."),
        (_no_rope, "config.json must describe a model, got: AttributeError"),
        (_text_heads, "text_config.num_attention_heads must be a positive whole number, got 0"),
        (_replaced("config.json", "[1]"), "config.json must be a Qwen3-ASR's config, got: TypeError"),
        (_replaced("tokenizer_config.json", "[]"), "must hold a tokenizer and a preprocessor"),
        (_replaced("preprocessor_config.json", "[]"), "must hold a tokenizer and a preprocessor"),
        (_replaced("preprocessor_config.json", "{}"), "preprocessor_config.json: feature_size must be 128, got 80"),
        (_replaced("generation_config.json", "[]"), "eos_token_id must hold the end token's id 1017, got []"),
        (_window, "audio_config.n_window must be 50, got 100"),
        (_other_model, "config.json must name model_type 'qwen3_asr', got 'qwen3'"),
        (_untied, "lm_head must be tied to the embedding"),
        (_cut, "model.safetensors must be a safetensors file"),
    ],
)
def test_check_names_the_mismatch(
    tmp_path: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    plant: Callable[[Path], None],
    told: str,
) -> None:
    plant(teacher)

    lines = failures(run_config(tmp_path, teacher), capsys)

    assert any(told in line for line in lines), lines


@pytest.mark.usefixtures("loads_everything")
def test_check_names_two_mismatches_at_once(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _quantized(teacher)
    _audio_token(teacher)

    lines = failures(run_config(tmp_path, teacher), capsys)

    assert len(lines) == 2


@pytest.mark.usefixtures("loads_everything")
def test_check_accepts_a_head_that_is_stored_twice(tmp_path: Path, teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["thinker.lm_head.weight"] = tensors["thinker.model.embed_tokens.weight"].clone()
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})

    check.run(run_config(tmp_path, teacher))


@pytest.mark.usefixtures("loads_everything")
def test_check_sees_a_transcript_that_differs_from_qwen_asr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qad_dist.asr import transcribe

    honest = transcribe.collate

    def deaf(examples: "Sequence[Example]", *, prompt: "Prompt") -> "Batch":
        return honest([replace(one, mel_MF=torch.zeros_like(one.mel_MF)) for one in examples], prompt=prompt)

    monkeypatch.setattr(transcribe, "collate", deaf)

    (line,) = failures(run_config(tmp_path, ASSETS / "nano-teacher"), capsys)

    assert f"must be qwen-asr's English: {FIRST_TEXT!r}, got " in line


@pytest.mark.usefixtures("loads_everything")
@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_check_compares_utterances_of_less_than_half_a_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float
) -> None:
    """Neither side pads them."""
    run = run_config(tmp_path, ASSETS / "nano-teacher")
    (path,) = (tmp_path / "recordings").iterdir()
    audio_A, rate = soundfile.read(path)
    path.unlink()
    soundfile.write(tmp_path / "recordings" / "short.wav", audio_A[: round(seconds * rate)], rate)

    check.run(run)

    assert "transcript: of short equals qwen-asr's" in capsys.readouterr().out


@pytest.mark.usefixtures("loads_everything")
def test_check_names_an_input_without_any_utterance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_config(tmp_path, ASSETS / "nano-teacher")
    for path in (tmp_path / "recordings").iterdir():
        path.unlink()
    soundfile.write(tmp_path / "recordings" / "short.wav", np.zeros(SAMPLE_RATE_HZ // 20), SAMPLE_RATE_HZ)

    (line,) = failures(run, capsys)

    assert f"{tmp_path / 'recordings'} must hold an utterance to transcribe among its first 1 recordings" in line


@pytest.mark.usefixtures("loads_everything")
def test_check_names_a_deepspeed_file_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_config(tmp_path, ASSETS / "nano-teacher", train={"deepspeed": str(tmp_path / "zero.json")})

    (line,) = failures(run, capsys)

    assert f"train.deepspeed must be a DeepSpeed JSON file, got '{tmp_path / 'zero.json'}'" in line


def test_dry_run_names_what_would_be_read_and_reads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_config(tmp_path, tmp_path / "no-such-model")

    check.dry_run(run)

    told = capsys.readouterr().out
    assert str(tmp_path / "no-such-model") in told
    assert str(tmp_path / "recordings") in told
