"""Utterances with responses, without a label file."""

from collections.abc import Sequence

import numpy as np

from shards.index import UtteranceTable
from shards.labelled import LabelledTable, LabelledUtterance, Response, Responses
from shards.schema import Utterance


def response_of(
    tokens: int, language: str | None = "English", *, prompt_language: str | None = None, ce_weight: float = 1.0
) -> Response:
    """So many tokens, counted from 100."""
    return Response(np.arange(100, 100 + tokens, dtype=np.int32), language, prompt_language, ce_weight)


def table_of(rows: Sequence[LabelledUtterance]) -> LabelledTable:
    """The table of these pairs, in this order, as of one label file."""
    found = [response for _, response in rows]
    names = list(dict.fromkeys([language for one in found for language in (one.language, one.prompt_language)]))
    starts = np.cumsum([0, *(len(response.token_ids) for response in found)])
    responses = Responses(
        token_ids=np.concatenate([response.token_ids for response in found]),
        starts=starts,
        languages=np.array([names.index(response.language) for response in found]),
        prompt_languages=np.array([names.index(response.prompt_language) for response in found]),
        names=names,
        ce_weights=np.array([response.ce_weight for response in found], np.float32),
        hidden_starts=starts[:-1],
        is_second=np.zeros(len(rows), np.bool_),
    )
    return LabelledTable(UtteranceTable.of(Utterance, [utterance for utterance, _ in rows]), responses)
