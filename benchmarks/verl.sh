#!/usr/bin/env bash
# Try verl 0.9.1 for real, in an environment of its own, for it wants transformers below 5.11 and TRL a later one:
#   benchmarks/verl.sh [FOLDER]
# Installs sagerec there as users would, so that verl finds the losses by their entry point, and runs the tests of both.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-.venv-verl}
PYTHON=${PYTHON:-python3}
if ! "$FOLDER/bin/python" -c "import verl" 2>/dev/null; then
    "$PYTHON" -m venv "$FOLDER"
    "$FOLDER/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}"
    "$FOLDER/bin/python" -m pip install --quiet ".[verl]" pytest hypothesis
fi
"$FOLDER/bin/python" -m pip install --quiet --no-deps --force-reinstall .
OMP_NUM_THREADS=1 "$FOLDER/bin/python" -m pytest tests/test_verl.py tests/test_parity.py -rs
