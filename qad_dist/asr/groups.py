"""Groups of utterances that are decoded together: what ranks share, wherever a set is decoded that has no shards.

Groups follow from durations and settings alone, never from the ranks: what is computed for an utterance depends in its
last digits on what else is in the batch, so that equal groups are what makes any number of ranks write the same.

Dimension key: U utterances, M mel bins, F frames.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import Decoder, Hypothesis, Request, response_limit, slot_length
from qad_dist.config.decoding import DecodingSection
from shards.plan import plan_decoding

Batch = list[int]
"""Places of utterances whose prompts go through the model together."""
Group = list[Batch]
"""What is decoded at once, each utterance in a slot of its own."""


def plan_groups(
    durations_U: npt.NDArray[np.float64], settings: DecodingSection, *, num_groups: int, smallest: int
) -> list[Group]:
    """Share utterances out, the longest first, so that those of a group end at about the same time.

    Args:
        durations_U: Seconds.
        settings: Say how many are decoded at once.
        num_groups: Wanted, for the ranks to share; large sets have more groups.
        smallest: Utterances that a group has at least, the last one excepted: small ones decode slowly.
    """
    order = np.argsort(-durations_U, kind="stable")
    size = min(settings.slots, max(smallest, math.ceil(len(order) / num_groups)))
    return [_batches(order[start : start + size], durations_U, settings) for start in range(0, len(order), size)]


def utterance_limit(settings: DecodingSection, duration_seconds: float) -> int:
    """Most tokens of the response to so much audio."""
    return response_limit(
        duration_seconds,
        max_response_tokens=settings.max_response_tokens,
        max_tokens_per_second=settings.max_tokens_per_second,
    )


class GroupDecoder:
    """Decodes one group after the other in the same memory."""

    def __init__(
        self,
        model: AsrModel,
        settings: DecodingSection,
        durations_U: npt.NDArray[np.float64],
        languages: Sequence[str | None],
        groups: Sequence[Group],
    ) -> None:
        """Take the memory.

        Args:
            model: With the prompt to use.
            settings: Limits of responses.
            durations_U: Seconds, of all utterances.
            languages: What the model is told of each.
            groups: All of the set, whichever rank has them: on a GPU every slot is in every step, and no rank may
                compute in other shapes than the others.
        """
        self._languages = languages
        self._limits = [utterance_limit(settings, duration) for duration in durations_U.tolist()]
        slots = max(sum(map(len, group)) for group in groups)
        length = slot_length(model.prompt, durations_U.tolist(), self._limits, languages)
        self._decoder = Decoder(model, slots=slots, max_length=length)

    def decode(self, batches: Sequence[Sequence[tuple[int, Tensor]]]) -> Iterator[tuple[int, Hypothesis]]:
        """Decode a group.

        Args:
            batches: Place and log-mel ``[M, F]`` of what can be read of each batch.

        Yields:
            Place and hypothesis, as they end.
        """
        places = [place for batch in batches for place, _ in batch]
        requests = [
            [Request(mel_MF, self._limits[place], self._languages[place]) for place, mel_MF in batch]
            for batch in batches
        ]
        for number, hypothesis in self._decoder.decode(requests):
            yield places[number], hypothesis


def _batches(group_U: npt.NDArray[np.int64], durations_U: npt.NDArray[np.float64], settings: DecodingSection) -> Group:
    group = group_U.tolist()
    planned = plan_decoding(durations_U[group], batch_audio_seconds=settings.batch_audio_seconds)
    return [[group[place] for place in batch] for batch in planned]
