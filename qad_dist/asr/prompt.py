"""The model's one prompt and its two forms of answer. Labelling, calibration, training and scoring all use this file.

``<|im_start|>system\\n{context}<|im_end|>\\n<|im_start|>user\\n<|audio_start|><|audio_pad|>xN<|audio_end|><|im_end|>\\n``
``<|im_start|>assistant\\n`` and then the response: ``language English<asr_text>TEXT<|im_end|>``. Everything from
``language`` to the end token is response; ids are read from the checkpoint's own tokenizer and chat template.

A model that is told the language finds ``language English<asr_text>`` at the end of its prompt, and the response is
``TEXT<|im_end|>``. The context, names and terms to expect, is empty unless :meth:`Prompt.with_context` says otherwise.

Source: qwen_asr 0.0.6, ``Qwen3ASRModel._build_text_prompt``.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from qad_dist.asr.checkpoint import model_errors
from shards.errors import ConfigError, ModelError

TEXT_TAG = "<asr_text>"
END_TOKEN = "<|im_end|>"  # noqa: S105  a token of the prompt, not a password
LANGUAGE_PREFIX = "language "


# Of qwen-asr's processor: it becomes an audio token wherever it stands in a prompt's text.
_PLACEHOLDER = "<|audio_placeholder|>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids around the audio, and how to read what comes back."""

    prefix_ids: tuple[int, ...]
    """Everything before the first audio token."""
    suffix_ids: tuple[int, ...]
    """Everything between the last audio token and the response, in automatic language mode."""
    audio_id: int
    """The placeholder that the audio tower's output replaces."""
    end_id: int
    """Ends a response; part of it."""
    processor: Any
    suffix_text: str
    """What ``suffix_ids`` are the ids of."""
    _told_suffixes: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_processor(cls, processor: Any, *, context: str = "") -> Self:
        """Read the prompt from a checkpoint's processor.

        Args:
            processor: The checkpoint's.
            context: As in :meth:`with_context`.

        Raises:
            ConfigError: The context spells out a token.
            ModelError: The chat template has no place for audio or context, or the tokenizer lacks the end token.
        """
        tokenizer = processor.tokenizer
        if context:
            _check_context(context, tokenizer)
        messages = [
            {"role": "system", "content": context},
            {"role": "user", "content": [{"type": "audio", "audio": ""}]},
        ]
        with model_errors("the chat template must render a prompt"):
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, placeholder, after = text.partition(processor.audio_token)
        if not placeholder or processor.audio_token in after:
            raise ModelError(
                f"the chat template must place {processor.audio_token} once, got {text!r}; copy the base model's files"
            )
        if context.strip() not in before:
            raise ModelError(
                f"the chat template must place the context before the audio, got {text!r}; copy the base model's files"
            )
        end_id = tokenizer.convert_tokens_to_ids(END_TOKEN)
        if end_id is None or end_id == tokenizer.unk_token_id:
            raise ModelError(f"the tokenizer must know {END_TOKEN}, got no such token; copy the base model's files")
        return cls(
            prefix_ids=tuple(tokenizer(before)["input_ids"]),
            suffix_ids=tuple(tokenizer(after)["input_ids"]),
            audio_id=tokenizer.convert_tokens_to_ids(processor.audio_token),
            end_id=end_id,
            processor=processor,
            suffix_text=after,
        )

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return self.processor.tokenizer

    def with_context(self, text: str) -> Self:
        """The prompt whose system turn is this text: names and terms to expect; empty for none.

        Raises:
            ConfigError: The text spells out a token of the model. In qwen-asr it would become that token, and the
                prompt another one.
        """
        return self.from_processor(self.processor, context=text)

    def build(self, num_audio_tokens: int, *, language: str | None = None) -> list[int]:
        """Prompt ids for an utterance of that many audio tokens.

        Args:
            num_audio_tokens: From :func:`~qad_dist.asr.audio_tower.num_audio_tokens`.
            language: What the model is told, one of its 30 names; None leaves it to name the language itself.
        """
        return [*self.prefix_ids, *[self.audio_id] * num_audio_tokens, *self._suffix(language)]

    def num_prompt_tokens(self, num_audio_tokens: int, *, language: str | None = None) -> int:
        """Length of :meth:`build`."""
        return len(self.prefix_ids) + num_audio_tokens + len(self._suffix(language))

    def parse(self, token_ids: list[int] | tuple[int, ...], *, language: str | None = None) -> tuple[str, str | None]:
        """Text and language of a response.

        Args:
            token_ids: A response; everything from the first end token on is left out.
            language: What the prompt told the model. Then all of the response is text.

        Returns:
            The transcript, and the language as qwen-asr names it: what the response names, None for ``language None``
            and where none is named; or what was told, and None for a response without text.
        """
        ids = list(token_ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        # <asr_text> is an added token, but not a special one: it survives the decoding and can be split at.
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if language is not None:
            return decoded.strip(), language if decoded.strip() else None
        tag, separator, text = decoded.partition(TEXT_TAG)
        return (text.strip(), _language(tag)) if separator else (decoded.strip(), None)

    def _suffix(self, language: str | None) -> tuple[int, ...]:
        if language is None:
            return self.suffix_ids
        if language not in self._told_suffixes:
            text = f"{self.suffix_text}{LANGUAGE_PREFIX}{language}{TEXT_TAG}"
            self._told_suffixes[language] = tuple(self.tokenizer(text)["input_ids"])
        return self._told_suffixes[language]


def _check_context(context: str, tokenizer: Any) -> None:
    names = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for name in (*names, _PLACEHOLDER):
        if name in context:
            raise ConfigError(f"label.context must not spell out a token of the model, got {name!r}; leave it out")


def _language(tag: str) -> str | None:
    """The language that is named before the text, by qwen-asr's rule.

    Source: qwen_asr 0.0.6, ``parse_asr_output`` and ``normalize_language_name``.
    """
    if f"{LANGUAGE_PREFIX}none" in tag.lower():
        return None
    lines = (line.strip() for line in tag.splitlines())
    named = next((line for line in lines if line.lower().startswith(LANGUAGE_PREFIX)), "")
    name = named[len(LANGUAGE_PREFIX) :].strip()
    return name[:1].upper() + name[1:].lower() or None
