"""Pack audio into shards: CPU only, one program, many processes.

python launch/pack.py --config configs/toy.yaml
python launch/pack.py --config configs/toy.yaml --array 3/16    # the fourth of sixteen jobs, after `plan`; then `merge`
python launch/pack.py verify --config configs/toy.yaml          # every byte; --quick: sizes; --deep: every sample too
python launch/pack.py stats --config configs/toy.yaml
python launch/pack.py splice --config configs/toy.yaml          # further training speech, of pieces of what is packed
"""

import argparse
import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import Command, run_program


def _run(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import pack

    pack.run(config, array=options.array)


def _verify(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import pack

    pack.verify(config, quick=options.quick, deep=options.deep)


def _without_options(name: str) -> Command:
    def call(config: RunConfig, options: argparse.Namespace) -> None:
        from qad_dist.stages import pack

        getattr(pack, name)(config)

    return call


def _dry_run(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import pack

    pack.dry_run(config)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--array", metavar="I/N", help="pack the shards of job I (from 0) of N; `merge` ends the pack")
    parser.add_argument("--quick", action="store_true", help="verify: compare sizes only")
    parser.add_argument("--deep", action="store_true", help="verify: decode every utterance, too")


if __name__ == "__main__":
    commands = {"run": _run, "verify": _verify}
    commands |= {name: _without_options(name) for name in ("plan", "merge", "stats", "splice")}
    sys.exit(run_program(__doc__, commands, dry_run=_dry_run, add_options=_add_options))
