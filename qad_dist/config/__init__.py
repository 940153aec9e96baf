"""Every setting of a run: a YAML file, its sections a module each, checked once and frozen."""

from qad_dist.config.run import RunConfig, dump_run, load_run

__all__ = ["RunConfig", "dump_run", "load_run"]
