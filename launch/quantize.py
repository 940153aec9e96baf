"""Make the PTQ student: the decoder's Linear layers in INT8, smoothed and calibrated on real audio.

accelerate launch --config_file configs/accelerate/one_node.yaml launch/quantize.py --config configs/toy.yaml
"""

import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig) -> None:
    from qad_dist.stages import quantize

    quantize.run(config)


def _dry_run(config: RunConfig) -> None:
    from qad_dist.stages import quantize

    quantize.dry_run(config)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, {"run": _run}, dry_run=_dry_run))
