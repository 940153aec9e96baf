"""A rank's share of the calibration set, as quantization walks it through the decoder."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qad_dist.asr.dataset import LabelledSet
from qad_dist.asr.decoder import DecoderStack, embed
from qad_dist.asr.load import AsrModel
from qad_dist.asr.made_clips import MadeClips
from qad_dist.batch import Batch
from qad_dist.calibration_set import CalibrationSet
from qad_dist.config import RunConfig
from qad_dist.heldout import kl_between
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import Source
from qad_dist.quant.walk import WalkBatch
from qad_dist.runtime.world import World
from shards.errors import ModelError
from shards.plan import plan_epoch
from shards.workers import Reader

MADE_AT_ONCE = 8
"""Made clips of a batch: 240 s of audio at most."""


class CalibrationData:
    """The chosen utterances and the made clips in batches that are the same on any number of ranks."""

    def __init__(self, run: RunConfig, chosen: CalibrationSet, made: MadeClips, reader: Reader, world: World) -> None:
        """Plan the batches.

        Args:
            run: The run.
            chosen: Utterances with their responses.
            made: Clips that were made, with theirs; never of the search part.
            reader: Of the shards.
            world: Which share is ours.
        """
        self._run, self._chosen, self._made, self._reader, self._world = run, chosen, made, reader, world

    @property
    def num_made(self) -> int:
        """Made clips."""
        return len(self._made)

    def source(self, model: AsrModel) -> Source:
        """Calibration data for a float32 model: its batches are made here, and stay in memory."""
        dataset = self._dataset(model)
        batches = [
            walk_batch(model, _checked(batch), number=number, is_search=is_search)
            for number, is_search, batch in self._batches(dataset)
        ]

        def kl(batch: WalkBatch, student_ND: Tensor, teacher_ND: Tensor) -> tuple[float, int]:
            return kl_between(model, batch, student_ND, teacher_ND)

        @torch.no_grad()
        def run_all() -> None:
            stack = DecoderStack(model.decoder.layers)
            for _, _, batch in self._batches(dataset):
                embedded = embed(model, batch.to(model.device))
                stack(embedded.hidden_ND, embedded.cos_1NE, embedded.sin_1NE, embedded.segments)

        return Source(batches=batches, kl=kl, run_all=run_all, world=self._world)

    def _dataset(self, model: AsrModel) -> LabelledSet:
        prompt = model.prompt.with_context(self._run.label.context)
        return LabelledSet(self._chosen.rows, reader=self._reader, prompt=prompt, extractor=model.extractor)

    def _batches(self, dataset: LabelledSet) -> Iterator[tuple[int, bool, Batch]]:
        """This rank's: number, whether of the search part, contents. Always at least one."""
        planned: list[tuple[bool, list[int]]] = []
        for part, places in ((True, self._chosen.search_places), (False, self._chosen.other_places)):
            steps = plan_epoch(
                dataset.num_tokens[places],
                seed=self._run.seed,
                epoch=0,
                token_budget=max(self._run.quantize.micro_batch_tokens, int(dataset.num_tokens.max())),
                micro_batches_per_step=1,
            )
            planned += [(part, places[step[0]].tolist()) for step in steps]
        made = [list(range(start, len(self._made)))[:MADE_AT_ONCE] for start in range(0, len(self._made), MADE_AT_ONCE)]
        numbers = list(range(len(planned) + len(made)))
        own = numbers[self._world.rank :: self._world.world_size] or numbers[:1]
        planned_here = [number for number in own if number < len(planned)]
        contents = dataset.batches([planned[number][1] for number in planned_here])
        for number, batch in zip(planned_here, contents, strict=True):
            yield number, planned[number][0], batch
        for number in own[len(planned_here) :]:
            yield number, False, self._made.batch(made[number - len(planned)])


def _checked(batch: Batch) -> Batch:
    if batch.audio_positions_P.numel() == 0:
        raise ModelError("calibration batches must hold audio positions, got none; the prompt is broken")
    return batch
