"""Train the QAD student by distillation from the teacher, its decoder sharded by DeepSpeed.

accelerate launch --config_file configs/accelerate/one_node.yaml launch/train.py --config configs/toy.yaml
"""

import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig) -> None:
    from qad_dist.stages import train

    train.run(config)


def _dry_run(config: RunConfig) -> None:
    from qad_dist.stages import train

    train.dry_run(config)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, {"run": _run}, dry_run=_dry_run))
