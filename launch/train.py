"""Train the QAD student by distillation from the teacher, its decoder sharded by DeepSpeed.

accelerate launch --config_file configs/accelerate/one_node.yaml launch/train.py --config configs/toy.yaml
accelerate launch --config_file configs/accelerate/one_node.yaml launch/train.py sanity --config configs/toy.yaml
python launch/train.py publish --config configs/toy.yaml

`sanity` sees that the student learns four utterances by heart, and writes nothing; `publish` writes the best student so
far as the result, while training goes on, so that score and export can take it.
"""

import argparse
import sys

from qad_dist.config import RunConfig
from qad_dist.runtime.program import run_program


def _run(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import train

    train.run(_resuming(config, options))


def _sanity(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import train

    train.sanity(config)


def _publish(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import train

    train.publish(config)


def _dry_run(config: RunConfig, options: argparse.Namespace) -> None:
    from qad_dist.stages import train

    train.dry_run(_resuming(config, options))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", metavar="auto|none|FOLDER", help="short for --set train.resume=...")


def _resuming(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    if options.resume is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"resume": options.resume})})


if __name__ == "__main__":
    commands = {"run": _run, "sanity": _sanity, "publish": _publish}
    sys.exit(run_program(__doc__, commands, dry_run=_dry_run, add_options=_add_options))
