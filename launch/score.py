"""Score teacher, PTQ student and QAD student side by side: WER or CER per language, and KL to the teacher.

accelerate launch --config_file configs/accelerate/one_node.yaml launch/score.py --config configs/toy.yaml
python launch/score.py table --config configs/toy.yaml
"""

import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig) -> None:
    from qad_dist.stages import score

    score.run(config)


def _table(config: RunConfig) -> None:
    from qad_dist.stages import score

    score.table(config)


def _dry_run(config: RunConfig) -> None:
    from qad_dist.stages import score

    score.dry_run(config)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, {"run": _run, "table": _table}, dry_run=_dry_run))
