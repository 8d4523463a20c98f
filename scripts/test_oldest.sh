#!/usr/bin/env bash
# Set up a second virtual environment with the oldest releases that work; run the tests of what meets them.
# usage: bash scripts/test_oldest.sh [PYTEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_venv.sh
prepare_venv .venv-oldest constraints.txt -e . pytest hypothesis
source .venv-oldest/bin/activate
quiet_pip .venv-oldest install -r constraints-oldest.txt
python -m pip check
# Bloom itself takes a static cache since transformers 5.21 only
python -m pytest tests/memory tests/checkpoint tests/reference tests/unit \
    --deselect "tests/memory/test_promises.py::test_static_cache[bloom]" "$@"
