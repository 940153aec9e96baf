"""Write the QAD student as a folder that qwen-asr loads, and check it in a fresh process.

python launch/export.py --config configs/toy.yaml
python launch/export.py verify --config configs/toy.yaml
"""

import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig) -> None:
    from qad_dist.stages import export

    export.run(config)


def _verify(config: RunConfig) -> None:
    from qad_dist.stages import export

    export.verify(config)


def _dry_run(config: RunConfig) -> None:
    from qad_dist.stages import export

    export.dry_run(config)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, {"run": _run, "verify": _verify}, dry_run=_dry_run))
