"""Label every utterance with the full-precision teacher, on all ranks, and judge the labels.

accelerate launch --config_file configs/accelerate/one_node.yaml launch/label.py --config configs/toy.yaml
python launch/label.py judge --config configs/toy.yaml --set label.filters.loop.action=kl_only
python launch/label.py verify --config configs/toy.yaml
"""

import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig) -> None:
    from qad_dist.stages import label

    label.run(config)


def _judge(config: RunConfig) -> None:
    from qad_dist.stages import label

    label.judge(config)


def _verify(config: RunConfig) -> None:
    from qad_dist.stages import label

    label.verify(config)


def _dry_run(config: RunConfig) -> None:
    from qad_dist.stages import label

    label.dry_run(config)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, {"run": _run, "judge": _judge, "verify": _verify}, dry_run=_dry_run))
