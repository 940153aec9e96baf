"""The model's one prompt and its one form of answer. Labelling, calibration, training and scoring all use this file.

``<|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n<|audio_start|><|audio_pad|>xN<|audio_end|><|im_end|>\\n``
``<|im_start|>assistant\\n`` and then the response: ``language English<asr_text>TEXT<|im_end|>``. Everything from
``language`` to the end token is response; ids are read from the checkpoint's own tokenizer and chat template.
"""

from dataclasses import dataclass
from typing import Any, Self

from qad_dist.asr.checkpoint import model_errors
from shards.errors import ModelError

TEXT_TAG = "<asr_text>"
END_TOKEN = "<|im_end|>"  # noqa: S105  a token of the prompt, not a password
LANGUAGE_PREFIX = "language "


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids around the audio, and how to read what comes back."""

    prefix_ids: tuple[int, ...]
    """Everything before the first audio token."""
    suffix_ids: tuple[int, ...]
    """Everything between the last audio token and the response."""
    audio_id: int
    """The placeholder that the audio tower's output replaces."""
    end_id: int
    """Ends a response; part of it."""
    tokenizer: Any

    @classmethod
    def from_processor(cls, processor: Any) -> Self:
        """Read the prompt from a checkpoint's processor.

        Raises:
            ModelError: The chat template has no place for audio, or the tokenizer lacks the end token.
        """
        tokenizer = processor.tokenizer
        messages = [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "audio", "audio": ""}]},
        ]
        with model_errors("the chat template must render a prompt"):
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, placeholder, after = text.partition(processor.audio_token)
        if not placeholder or processor.audio_token in after:
            raise ModelError(
                f"the chat template must place {processor.audio_token} once, got {text!r}; copy the base model's files"
            )
        end_id = tokenizer.convert_tokens_to_ids(END_TOKEN)
        if end_id is None or end_id == tokenizer.unk_token_id:
            raise ModelError(f"the tokenizer must know {END_TOKEN}, got no such token; copy the base model's files")
        return cls(
            prefix_ids=tuple(tokenizer(before)["input_ids"]),
            suffix_ids=tuple(tokenizer(after)["input_ids"]),
            audio_id=tokenizer.convert_tokens_to_ids(processor.audio_token),
            end_id=end_id,
            tokenizer=tokenizer,
        )

    def build(self, num_audio_tokens: int) -> list[int]:
        """Prompt ids for an utterance of that many audio tokens."""
        return [*self.prefix_ids, *[self.audio_id] * num_audio_tokens, *self.suffix_ids]

    def num_prompt_tokens(self, num_audio_tokens: int) -> int:
        """Length of :meth:`build`."""
        return len(self.prefix_ids) + num_audio_tokens + len(self.suffix_ids)

    def parse(self, token_ids: list[int] | tuple[int, ...]) -> tuple[str, str | None]:
        """Text and language of a response.

        Args:
            token_ids: A response; everything from the first end token on is left out.

        Returns:
            The transcript, and the language as qwen-asr names it (None for ``language None`` and where none is named).
        """
        ids = list(token_ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        # <asr_text> is an added token, but not a special one: it survives the decoding and can be split at.
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        tag, separator, text = decoded.partition(TEXT_TAG)
        return (text.strip(), _language(tag)) if separator else (decoded.strip(), None)


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
