"""Which utterances are labelled, and in which order their shards. Pure: no I/O."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shards.index import UNKNOWN_LANGUAGE, UtteranceTable
from shards.schema import SAMPLE_RATE_HZ


def select(utterances: UtteranceTable, max_hours_per_language: float | None) -> npt.NDArray[np.bool_]:
    """Whether each utterance is to be labelled: of each language in each split the first ones, until there is enough.

    What is chosen of a split does not depend on the other splits, nor that of a language on other languages; a higher
    limit adds utterances and removes none.

    Args:
        utterances: In the order of the index.
        max_hours_per_language: Is reached by the last utterance that is taken, if there is enough audio. Utterances
            without a language are a group of their own. None takes all.
    """
    if max_hours_per_language is None or not len(utterances):
        return np.ones(len(utterances), np.bool_)
    splits, _ = utterances.codes("split")
    languages, names = utterances.codes("language")
    groups = splits * len(names) + languages
    # In samples: whole numbers add up without an error, however many there are.
    num_samples = np.rint(utterances.numbers("duration_seconds") * SAMPLE_RATE_HZ).astype(np.int64)
    order = np.argsort(groups, kind="stable")
    num_before = np.cumsum(num_samples[order]) - num_samples[order]
    begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
    num_before -= np.repeat(num_before[begins], np.diff(begins, append=len(order)))
    selected = np.empty(len(utterances), np.bool_)
    selected[order] = num_before < round(max_hours_per_language * 3600 * SAMPLE_RATE_HZ)
    return selected


def label_order(seconds_by_language: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The shards in an order in which the languages take turns, so that an early end leaves some of each.

    A shard counts for the language that it has most of. A language's own shards keep their order; the languages come by
    name, the unknown one last.

    Args:
        seconds_by_language: Of each shard, in the order of the index.
    """
    by_language: defaultdict[str, list[str]] = defaultdict(list)
    for shard, seconds in seconds_by_language.items():
        by_language[min(seconds, key=lambda language: (-seconds[language], language), default="")].append(shard)
    queues = [by_language[name] for name in sorted(by_language, key=lambda name: (name == UNKNOWN_LANGUAGE, name))]
    turns = [(turn, place, shard) for place, queue in enumerate(queues) for turn, shard in enumerate(queue)]
    return [shard for _, _, shard in sorted(turns)]


def own_first(order: Sequence[str], *, rank: int, world_size: int) -> list[str]:
    """The same shards in the order in which one rank claims them: its share, then those of the others from their ends.

    Its share is every ``world_size``-th shard. A rank that is through with it helps those after it, and meets them late
    by beginning where they end.
    """
    shares = [order[other % world_size :: world_size] for other in range(rank, rank + world_size)]
    return [*shares[0], *(shard for share in shares[1:] for shard in reversed(share))]
