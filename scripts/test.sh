#!/usr/bin/env bash
# Set up a virtual environment with the pinned versions; run lint, types and all default tests.
# usage: bash scripts/test.sh [PYTEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-} ${2:-}" = "-m vllm" ]; then
    exec bash scripts/test_vllm.sh "${@:3}"
fi
source scripts/_venv.sh
prepare_venv .venv constraints.txt -e ".[dev,ray,eval,ask,serve]"
source .venv/bin/activate
ruff check .
ruff format --check .
mypy
python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
