"""How a run reads its shards: the settings of ``read:`` made into readers."""

from pathlib import Path

from qad_dist.config import RunConfig
from shards.cache import Cache
from shards.read import Shards
from shards.workers import Reader


def open_shards(run: RunConfig, folder: Path | None = None) -> Shards:
    """The run's packed shards, or those of another packed folder.

    Raises:
        ShardError: There is no index.
    """
    return Shards(folder or run.stage_folder("pack"), cache=open_cache(run))


def open_cache(run: RunConfig) -> Cache | None:
    """Where the run keeps copies of shards that lie behind an address, if it says so."""
    if run.read.cache is None:
        return None
    return Cache(folder=Path(run.read.cache), max_bytes=round(run.read.cache_gib * 2**30))


def open_reader(run: RunConfig, folder: Path | None = None) -> Reader:
    """A reader of shards as :func:`open_shards` opens them, by this rank's workers, which start with the first read.

    To be closed, best by ``with``.
    """
    return Reader(open_shards(run, folder), workers=run.read.workers)
