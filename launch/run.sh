#!/usr/bin/env bash
# Sets up and runs the stages of a config in order on this machine, skipping finished ones:
#   bash launch/run.sh --config configs/toy.yaml [--from stage] [--to stage] [--dry-run] [--set a.b=c ...]
# Relative paths in the config are relative to the project's folder.
set -euo pipefail

# The config may be named from where the command is typed; the work happens in the project's folder.
arguments=()
for argument in "$@"; do
    if [ "${previous:-}" = --config ] && [ -f "$argument" ]; then
        argument="$(realpath "$argument")"
    elif [ "${argument#--config=}" != "$argument" ] && [ -f "${argument#--config=}" ]; then
        argument="--config=$(realpath "${argument#--config=}")"
    fi
    arguments+=("$argument")
    previous="$argument"
done

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck disable=SC2119  # no extras
set_up
exec python launch/run.py ${arguments[@]+"${arguments[@]}"}
