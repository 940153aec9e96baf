"""A program: several stages one after the other in the same processes, where a test needs their results together.

    accelerate launch ... tests/helpers/run_stages.py RANKS CONFIG RUN_FOLDER STAGE [STAGE ...]

Importing the libraries takes longer than all stages on a few utterances.
"""

import datetime
import importlib
import sys
from pathlib import Path

from qad_dist.config import load_run
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import current_world, exit_rank


def main(ranks: str, config: str, folder: str, *stages: str) -> None:
    # Not at the top, which processes that read shards run through, too.
    import torch.distributed as dist

    world = current_world()
    configure_logging(world)
    run = load_run(config, [f"run={folder}"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if world.world_size > 1:
            # A group of its own for each stage, met through a file: at the launcher's address there is only one.
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{stage}.store",
                rank=world.rank,
                world_size=world.world_size,
                timeout=datetime.timedelta(seconds=600),
            )
            assert dist.get_world_size() == int(ranks)
        assert world.world_size == int(ranks)
        importlib.import_module(f"qad_dist.stages.{stage}").run(run)
        assert not dist.is_initialized()
    exit_rank(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
