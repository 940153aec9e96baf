"""Utterances and answers for tests of what is made of them."""

from typing import Any

from qad_dist.answers import Answer
from qad_dist.config import RunConfig
from shards.schema import ENDED_BY_END_TOKEN, TEST, Utterance


def utterance(reference: str | None, *, key: str = "u", language: str | None = "English", **facts: Any) -> Utterance:
    told: dict[str, Any] = {
        "shard": "s.tar",
        "audio_name": f"{key}.flac",
        "audio_offset": 0,
        "audio_bytes": 1,
        "json_offset": 0,
        "json_bytes": 1,
        "duration_seconds": 1.0,
        "start_seconds": 0.0,
        "recording": key,
        "split": TEST,
        "speaker": None,
        "source": "x",
        **facts,
    }
    return Utterance(key=key, language=language, reference=reference, **told)


def answer(
    text: str,
    *,
    key: str = "u",
    language: str | None = "English",
    tokens: int = 4,
    kl: float | None = None,
    agreements: int | None = None,
    ended_by: str | None = ENDED_BY_END_TOKEN,
) -> Answer:
    return Answer(
        key=key,
        text=text,
        language=language,
        ended_by=ended_by,
        token_ids=(1,) * tokens,
        kl=kl,
        agreements=agreements,
    )


def run_config(**score: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": "unused",
            "model": {"path": "unused"},
            "pack": {"inputs": ["unused"]},
            "score": {"num_resamples": 1000, **score},
        }
    )
