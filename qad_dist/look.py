"""A look at a student in training: how far it is from its teacher on the held-out split, and what words that costs."""

from qad_dist.asr.dataset import LabelledSet, OnDamaged, languages_of
from qad_dist.asr.load import AsrModel
from qad_dist.config import RunConfig
from qad_dist.distill.evaluate import Distances, Evaluation, compare, summed
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.heldout import heldout_batches
from qad_dist.heldout_words import HeldOutWords, count_heldout_words, word_error_rate
from qad_dist.quant.state import fold_from
from qad_dist.runtime.engine import Engine
from qad_dist.runtime.world import World
from qad_dist.text.gap import Gap, describe_gap
from shards.workers import Reader

LAYERS = "layers."
"""In front of the names of a :class:`~qad_dist.asr.decoder.DecoderStack`'s weights."""


class Look:
    """Held-out utterances, and a whole copy of the student that decodes them; all ranks share the work."""

    def __init__(
        self,
        run: RunConfig,
        models: TeacherAndStudent,
        heldout: LabelledSet,
        *,
        engine: Engine,
        student: AsrModel,
        decoding: AsrModel | None,
        reader: Reader,
        world: World,
        on_damaged: OnDamaged,
    ) -> None:
        """Take the parts.

        Args:
            run: Says budgets and how many utterances are decoded.
            models: Teacher and student, as they are trained.
            heldout: The utterances to compare on.
            engine: Gives the student's weights.
            student: In training; gives its quantizers.
            decoding: A whole copy of it whose weights were folded once; None decodes nothing.
            reader: Of the shards.
            world: Which rank this is.
            on_damaged: Is told of each utterance that cannot be read.
        """
        self._run, self._models, self._heldout = run, models, heldout
        self._engine, self._student, self._decoding = engine, student, decoding
        self._reader, self._world, self._on_damaged = reader, world, on_damaged
        codes, names = languages_of(heldout.rows, detected_first=False)
        keys = heldout.rows.utterances.texts("key")
        self._languages = {str(key): names[code] for key, code in zip(keys, codes, strict=True)}
        self._decoded_rows = heldout.rows[: run.train.decode_utterances] if decoding is not None else None
        # The look that the gap was told from, for the loop's first one: the student is still the same.
        self._distances: Distances | None = None
        self._words: HeldOutWords | None = None

    def gap(self) -> Gap | None:
        """What there is to be gained, before the first step; None if nothing is decoded."""
        self._distances, self._words = self._compare(), self._count()
        if self._words is None:
            return None
        decoded = self._distances.only(set(self._words.keys))
        return describe_gap(decoded, self._words, format=self._run.quantize.format)

    def evaluate(self) -> Evaluation:
        """The distance of the student as it is."""
        distances, self._distances = self._distances or self._compare(), None
        return summed(distances, languages=self._languages)

    def word_error_rate(self) -> float | None:
        """Of the student as it is; None if nothing is decoded."""
        words, self._words = self._words or self._count(), None
        return None if words is None else word_error_rate(words)

    def _compare(self) -> Distances:
        batches = heldout_batches(
            self._heldout,
            self._run,
            self._world,
            token_budget=self._run.train.micro_batch_tokens,
            on_damaged=self._on_damaged,
        )
        return compare(self._models, batches, chunk_rows=self._run.train.loss_chunk_rows)

    def _count(self) -> HeldOutWords | None:
        if self._decoding is None or self._decoded_rows is None:
            return None
        folded, trained = self._decoding.decoder.layers, self._student.decoder.layers
        for name, weight in self._engine.trained_weights():
            fold_from(folded, trained, {name.removeprefix(LAYERS): weight})
        return count_heldout_words(
            self._run, self._decoding, self._decoded_rows, self._reader, self._world, on_damaged=self._on_damaged
        )
