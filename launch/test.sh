#!/usr/bin/env bash
# Sets up with the tools of developers, checks style, types and import contracts, and runs all tests; options go to
# pytest, e.g.: bash launch/test.sh -k config. Tests of recorded speech need QAD_SPEECH_DIR; QAD_TEST_PROCESSES (2) run
# side by side.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
say "checking style, types and import contracts"
ruff check .
ruff format --check .
pyright --level error --pythonpath .venv/bin/python
lint-imports

# Kinds that take seconds first, so that most mistakes show early.
folders=()
for kind in unit architecture determinism distributed faults integration end_to_end gpu; do
    [ ! -d "tests/$kind" ] || folders+=("tests/$kind")
done
# Side by side: nearly all of them have one thread each. What the tests of a file share is made once.
exec python -m pytest "${folders[@]}" --numprocesses "${QAD_TEST_PROCESSES:-2}" --dist loadfile "$@"
