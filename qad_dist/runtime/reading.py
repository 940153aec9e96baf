"""How a run reads its shards: the settings of ``read:`` made into readers."""

from pathlib import Path

from qad_dist.config import RunConfig
from shards.cache import Cache
from shards.read import Shards
from shards.workers import Reader


def open_shards(run: RunConfig) -> Shards:
    """The run's packed shards.

    Raises:
        ShardError: There is no index.
    """
    return Shards(run.stage_folder("pack"), cache=open_cache(run))


def open_cache(run: RunConfig) -> Cache | None:
    """Where the run keeps copies of shards that lie behind an address, if it says so."""
    if run.read.cache is None:
        return None
    return Cache(folder=Path(run.read.cache), max_bytes=round(run.read.cache_gib * 2**30))


def open_reader(run: RunConfig) -> Reader:
    """A reader of the run's packed shards with this rank's workers, which start when the first utterance is read.

    To be closed, best by ``with``.
    """
    return Reader(open_shards(run), workers=run.read.workers)
