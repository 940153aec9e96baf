"""Run the stages of a config in order on this machine; finished ones are skipped.

    bash launch/run.sh --config configs/toy.yaml [--from label] [--to score] [--dry-run] [--set a.b=c ...]

To do a stage again, remove its folder.
"""

import argparse
import os
import sys
from pathlib import Path

from qad_dist.config import RunConfig, load_run
from qad_dist.runtime.program import OneLineParser, add_config_options, call_command, tell
from qad_dist.runtime.record import STAGES
from shards.errors import QadError


def main() -> int:
    """Parse the command line and start the stages."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_config_options(parser)
    parser.add_argument("--from", dest="first", choices=STAGES, default=STAGES[0], help="stage to begin with")
    parser.add_argument("--to", dest="last", choices=STAGES, default=STAGES[-1], help="stage to end with")
    parser.add_argument("--dry-run", action="store_true", help="print commands, hours, memory and disk, and stop")
    try:
        arguments = parser.parse_args()
        config = load_run(arguments.config, arguments.overrides)
    except QadError as error:
        return tell(error)
    return call_command(lambda config: _start(config, arguments), config)


def _start(config: RunConfig, arguments: argparse.Namespace) -> None:
    from qad_dist.stages import run

    stages = run.chosen_stages(arguments.first, arguments.last)
    programs = Path(os.path.relpath(Path(__file__).parent))
    launch = run.launch_for(programs, arguments.config, arguments.overrides, config)
    if arguments.dry_run:
        sys.stdout.write(run.dry_run(config, launch, stages))
    else:
        run.run(config, launch, stages)
        sys.stdout.write(run.summary(config))


if __name__ == "__main__":
    sys.exit(main())
