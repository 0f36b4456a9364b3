#!/usr/bin/env bash
# Everything that a machine with a GPU has to say about this checkout, in one command: builds the
# extension for its card, runs the tests there, measures, checks the kernels, trains for a moment.
#
#   bash scripts/check_gpu.sh              needs a GPU; at most 8 minutes (--minutes)
#   bash scripts/check_gpu.sh --rehearse   the same stages at tiny sizes on the CPU, some 3 minutes
#   bash scripts/check_gpu.sh --help       choice of stages, where the results go
#
# PYTHON names the interpreter (default: `python` or `python3`, the first that has PyTorch). Nothing is installed:
# it has to hold PyTorch, Detectron2, pytest and what requirements.txt lists. DATA names a folder with
# train.json, val.json and images/ for the training; without one, digits are drawn.
# Results and logs go to $OUT, by default output/check_gpu. The exit status is 0 if all stages passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has_torch='import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
for python in ${PYTHON:-python python3}; do
    if "$python" -c "$has_torch" 2>/dev/null; then break; fi
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Waiting OpenMP threads would spin beside those that work.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
exec "$python" scripts/gpu/check.py "$@"
