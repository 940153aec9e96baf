"""The prompt against qwen-asr's processor, and every form of response."""

from types import SimpleNamespace
from typing import Any

import pytest
from qwen_asr.inference.utils import parse_asr_output

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import num_frames
from qad_dist.asr.prompt import Prompt
from shards.errors import ConfigError, ModelError
from tests.helpers.qwen import noise, reference_inputs


def ids_of(model: AsrModel, text: str) -> list[int]:
    return model.processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("seconds", [0.05, 0.5, 0.73, 0.99, 1.0, 1.01, 3.377, 8.0, 12.34, 30.0])
def test_prompt_ids_are_those_of_the_processor(nano: AsrModel, seconds: float) -> None:
    audio_A = noise(round(seconds * 16_000), seed=0)

    ids = nano.prompt.build(num_audio_tokens(num_frames(len(audio_A))))

    assert ids == reference_inputs(nano, audio_A)["input_ids"][0].tolist()
    assert nano.prompt.num_prompt_tokens(num_audio_tokens(num_frames(len(audio_A)))) == len(ids)


CONTEXTS = (
    *("", "Qwen", "Anna, Łukasz; 3.5 mg\n第二行 名前 ", "  two  spaces\n\n"),
    *("e\u0301 \u1e9b\u0323 ½", "a < b | c > d <|", "{{x}}"),
)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("language", [None, "English", "Chinese", "Cantonese", "Macedonian"])
def test_prompt_with_context_and_told_language_is_that_of_qwen_asr(
    nano: AsrModel, context: str, language: str | None
) -> None:
    audio_A = noise(30_000, seed=0)
    num_audio = num_audio_tokens(num_frames(len(audio_A)))
    prompt = nano.prompt.with_context(context)

    ids = prompt.build(num_audio, language=language)

    assert ids == reference_inputs(nano, audio_A, context=context, language=language)["input_ids"][0].tolist()
    assert prompt.num_prompt_tokens(num_audio, language=language) == len(ids)
    tag = [] if language is None else ids_of(nano, f"language {language}<asr_text>")
    assert ids[len(ids) - len(tag) :] == tag


def test_context_and_language_leave_the_plain_prompt_as_it_is(nano: AsrModel) -> None:
    before = nano.prompt.build(3)

    other = nano.prompt.with_context("some names")
    other.build(3, language="Thai")

    assert nano.prompt.build(3) == before == other.with_context("").build(3) != other.build(3)


@pytest.mark.parametrize(
    "token",
    [
        *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
        *("<asr_text>", "<|audio_placeholder|>"),
    ],
)
def test_context_that_spells_out_a_token_is_refused(nano: AsrModel, token: str) -> None:
    """In qwen-asr it becomes the token: a context could end its turn, or ask for audio that is not there."""
    with pytest.raises(ConfigError, match=r"label.context must not spell out a token of the model, got .*leave it out"):
        nano.prompt.with_context(f"names {token} and terms")


def test_chat_template_that_leaves_out_the_context_is_refused(nano: AsrModel) -> None:
    deaf = broken(nano, apply_chat_template=lambda *_, **__: "<|im_start|>user\n<|audio_pad|><|im_end|>\n")

    Prompt.from_processor(deaf)
    with pytest.raises(ModelError, match=r"chat template must place the context before the audio, got .*copy the base"):
        Prompt.from_processor(deaf, context="names")


def test_special_ids_are_those_of_the_checkpoint(nano: AsrModel) -> None:
    assert nano.prompt.audio_id == nano.model.config.thinker_config.audio_token_id == 1022
    assert [nano.prompt.end_id] == ids_of(nano, "<|im_end|>")


@pytest.mark.parametrize(
    ("response", "text", "language"),
    [
        ("language English<asr_text>seven three<|im_end|>", "seven three", "English"),
        ("language Chinese<asr_text>一五四五<|im_end|>", "一五四五", "Chinese"),
        ("language None<asr_text><|im_end|>", "", None),
        ("language Thai<asr_text><|im_end|>", "", "Thai"),
        ("seven three<|im_end|>", "seven three", None),
        ("<|im_end|>", "", None),
        ("language English<asr_text>seven three", "seven three", "English"),
        ("language English<asr_text> seven \n three <|im_end|>", "seven \n three", "English"),
        # Whatever a model writes behind its end token is not read.
        ("language English<asr_text>seven<|im_end|>language German<asr_text>acht<|im_end|>", "seven", "English"),
        ("seven<|im_end|><asr_text>three", "seven", None),
        # Words that are spoken are no tags.
        ("language English<asr_text>language German<|im_end|>", "language German", "English"),
        ("language English<asr_text>a <asr_text> b<|im_end|>", "a <asr_text> b", "English"),
    ],
)
def test_parse_reads_text_and_language(nano: AsrModel, response: str, text: str, language: str | None) -> None:
    assert nano.prompt.parse(ids_of(nano, response)) == (text, language)


@pytest.mark.parametrize(
    "response",
    [
        *("language English<asr_text>three", "language english<asr_text>three", "LANGUAGE gERMAN<asr_text>drei"),
        *("language None<asr_text>x", "language none<asr_text>", "language None, English<asr_text>three"),
        *("English<asr_text>three", "foo bar<asr_text>three", "<asr_text>three", "three", " three \n"),
        *("language Chinese\nx\n<asr_text>ok", "x\n language Chinese <asr_text>ok", "my language Chinese<asr_text>ok"),
        *("language<asr_text>ok", "language  <asr_text>ok", "language\nlanguage Thai<asr_text>ok"),
        *("language Chinese,English<asr_text>a", "language English<asr_text>a <asr_text> b"),
    ],
)
def test_parse_follows_the_rule_of_qwen_asr(nano: AsrModel, response: str) -> None:
    ids = ids_of(nano, response)
    language, text = parse_asr_output(nano.processor.tokenizer.decode(ids, skip_special_tokens=True))

    assert nano.prompt.parse(ids) == (text, language or None)


@pytest.mark.parametrize(
    "response",
    [
        *("seven three", " seven \n three ", "", "  ", "language German<asr_text>drei", "a <asr_text> b", "<asr_text>"),
        *("language None<asr_text>", "seven<|endoftext|> three"),
    ],
)
def test_response_to_a_told_language_is_text_by_the_rule_of_qwen_asr(nano: AsrModel, response: str) -> None:
    ids = ids_of(nano, response)
    decoded = nano.processor.tokenizer.decode(ids, skip_special_tokens=True)
    language, text = parse_asr_output(decoded, user_language="Thai")

    assert nano.prompt.parse(ids, language="Thai") == (text, language or None)
    assert nano.prompt.parse([*ids, nano.prompt.end_id, *ids], language="Thai") == (text, language or None)


def test_transcript_that_spells_out_a_special_token_does_not_end_the_response(nano: AsrModel) -> None:
    """Spelt in ordinary tokens it is text; only the one end token ends."""
    spelt = [token for part in ("<", "|im", "_end", "|", ">") for token in ids_of(nano, part)]
    assert nano.prompt.end_id not in spelt

    ids = [*ids_of(nano, "language English<asr_text>say "), *spelt, *ids_of(nano, " now<|im_end|>")]

    assert nano.prompt.parse(ids) == ("say <|im_end|> now", "English")


def test_other_special_tokens_are_left_out_of_the_text(nano: AsrModel) -> None:
    ids = ids_of(nano, "language English<asr_text>seven<|endoftext|> three<|im_end|>")

    assert nano.prompt.parse(tuple(ids)) == ("seven three", "English")


def test_build_and_parse_do_not_change_what_they_are_given(nano: AsrModel) -> None:
    ids = ids_of(nano, "language English<asr_text>one<|im_end|>two")
    before = list(ids)

    nano.prompt.parse(ids)

    assert ids == before
    assert nano.prompt.build(3) == nano.prompt.build(3)


def broken(model: AsrModel, **changes: Any) -> Any:
    """A processor with one part replaced."""
    processor = model.processor
    parts = {
        "tokenizer": processor.tokenizer,
        "audio_token": processor.audio_token,
        "apply_chat_template": processor.apply_chat_template,
    }
    return SimpleNamespace(**{**parts, **changes})


@pytest.mark.parametrize("text", ["no audio here", "<|audio_pad|> twice <|audio_pad|>"])
def test_chat_template_without_one_place_for_audio_is_refused(nano: AsrModel, text: str) -> None:
    processor = broken(nano, apply_chat_template=lambda *_, **__: text)

    with pytest.raises(ModelError, match=r"chat template must place <\|audio_pad\|> once, got .*copy the base model"):
        Prompt.from_processor(processor)


def test_chat_template_that_cannot_be_rendered_is_refused(nano: AsrModel) -> None:
    def broken_off(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("in the template")

    with pytest.raises(ModelError, match=r"template must render a prompt, got: ZeroDivisionError: in the template"):
        Prompt.from_processor(broken(nano, apply_chat_template=broken_off))


def test_tokenizer_without_the_end_token_is_refused(nano: AsrModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano.folder)
    lacking = SimpleNamespace(
        convert_tokens_to_ids=lambda token: None if token == "<|im_end|>" else tokenizer.convert_tokens_to_ids(token),
        unk_token_id=None,
    )

    with pytest.raises(ModelError, match=r"the tokenizer must know <\|im_end\|>, got no such token"):
        Prompt.from_processor(broken(nano, tokenizer=lacking))
