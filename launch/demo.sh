#!/usr/bin/env bash
# Sets up and runs all stages on the embedded teacher and digits, on two CPU ranks or the GPUs of this machine; ends with
# the table of the scores. Takes the options of launch/run.sh, e.g.: bash launch/demo.sh --set train.steps=20
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" --config configs/toy.yaml "$@"
