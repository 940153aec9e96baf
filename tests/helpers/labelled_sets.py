"""Labelled sets of tones."""

from dataclasses import fields

import torch

from qad_dist.asr.dataset import LabelledSet
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config.augment import AugmentConfig
from shards.labelled import LabelledUtterance
from shards.workers import Reader
from tests.helpers.labelled import table_of

# Around half a second, around one, and odd numbers of samples.
SAMPLES = [
    *(1_600, 4_801, 7_999, 8_000, 8_001, 8_160, 15_839, 15_999, 16_000, 16_001),
    *(16_160, 20_001, 24_000, 31_999, 32_000, 33_333, 40_007, 47_999, 48_000),
]


def dataset_of(
    rows: list[LabelledUtterance],
    reader: Reader,
    model: AsrModel,
    augment: AugmentConfig | None = None,
    *,
    seed: int = 0,
) -> LabelledSet:
    parts = {"reader": reader, "prompt": model.prompt, "extractor": model.extractor}
    return LabelledSet(table_of(rows), **parts, augment=augment, seed=seed)


def assert_equal(found: Batch, expected: Batch, *, but: tuple[str, ...] = ()) -> None:
    """To the bit."""
    for field in fields(Batch):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        if field.name in but:
            continue
        if isinstance(right, torch.Tensor):
            assert (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device)
            assert left.numpy().tobytes() == right.numpy().tobytes(), field.name
        else:
            assert left == right
