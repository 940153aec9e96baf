"""Pack audio into shards: CPU only, one program, many processes.

python launch/pack.py --config configs/toy.yaml
python launch/pack.py verify --config configs/toy.yaml
python launch/pack.py stats --config configs/toy.yaml
"""

import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig) -> None:
    from qad_dist.stages import pack

    pack.run(config)


def _verify(config: RunConfig) -> None:
    from qad_dist.stages import pack

    pack.verify(config)


def _stats(config: RunConfig) -> None:
    from qad_dist.stages import pack

    pack.stats(config)


def _dry_run(config: RunConfig) -> None:
    from qad_dist.stages import pack

    pack.dry_run(config)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, {"run": _run, "verify": _verify, "stats": _stats}, dry_run=_dry_run))
