"""Utterances with responses, without a label file."""

from collections.abc import Sequence

import numpy as np

from shards.index import UtteranceTable
from shards.labelled import LabelledTable, LabelledUtterance, Response, Responses
from shards.schema import Utterance


def response_of(tokens: int, language: str | None = "English") -> Response:
    """So many tokens, counted from 100."""
    return Response(np.arange(100, 100 + tokens, dtype=np.int32), language)


def table_of(rows: Sequence[LabelledUtterance]) -> LabelledTable:
    """The table of these pairs, in this order."""
    names = list(dict.fromkeys(response.language for _, response in rows))
    responses = Responses(
        token_ids=np.concatenate([response.token_ids for _, response in rows]),
        starts=np.cumsum([0, *(len(response.token_ids) for _, response in rows)]),
        languages=np.array([names.index(response.language) for _, response in rows]),
        names=names,
    )
    return LabelledTable(UtteranceTable.of(Utterance, [utterance for utterance, _ in rows]), responses)
