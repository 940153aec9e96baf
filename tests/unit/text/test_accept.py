import pytest

from qad_dist.text.accept import Verdict, verdict
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, PseudoLabel


def label(
    *, text: str = "seven", token_ids: tuple[int, ...] = (1, 2, 3), ended_by: str = ENDED_BY_END_TOKEN
) -> PseudoLabel:
    return PseudoLabel(
        key="a",
        token_ids=token_ids,
        text=text,
        language="English",
        token_logprobs=(-0.5,) * len(token_ids),
        mean_logprob=-0.5,
        ended_by=ended_by,
        duration_seconds=1.0,
    )


def test_verdict_keeps_a_response_that_ended_and_says_something() -> None:
    assert verdict(label()) == Verdict(kept=True, reason=None)


def test_verdict_drops_a_response_that_never_ended() -> None:
    assert verdict(label(ended_by=ENDED_BY_LENGTH)) == Verdict(kept=False, reason="runaway")


@pytest.mark.parametrize(("text", "token_ids"), [("", (1, 2, 3)), (" \n", (1, 2, 3)), ("", ())])
def test_verdict_drops_a_response_without_text(text: str, token_ids: tuple[int, ...]) -> None:
    assert verdict(label(text=text, token_ids=token_ids)) == Verdict(kept=False, reason="no_text")
