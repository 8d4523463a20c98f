#!/usr/bin/env bash
# Set up a virtual environment with the pinned versions and run `pace demo`.
# usage: bash scripts/demo.sh [OUT]
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
source scripts/_venv.sh
prepare_venv .venv constraints.txt -e ".[dev,ray,eval,ask,serve]"
venv="$PWD/.venv"
cd "$here"
"$venv/bin/pace" demo "$@"
