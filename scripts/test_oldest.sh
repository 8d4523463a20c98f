#!/usr/bin/env bash
# Set up a second virtual environment with the oldest transformers that pyproject.toml allows; run the tests of
# the checkpoints' own files and of the reference model there.
# usage: bash scripts/test_oldest.sh [PYTEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_venv.sh
oldest="$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)"
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
{ grep -v '^transformers==' constraints.txt; echo "transformers==$oldest"; } > "$constraints"
prepare_venv .venv-oldest "$constraints" -e . "pytest>=8" "hypothesis>=6.100"
source .venv-oldest/bin/activate
python -m pytest tests/memory tests/checkpoint tests/reference tests/unit "$@"
