#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder
# and runs the fuzz on them. The installed extension is left as it is.
#
#   bash scripts/asan_fuzz.sh [arguments of tests.layers.fuzz]      default: --cases 2000
#
# PYTHON names the interpreter (default: .venv/bin/python if there is one, else python3).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/tests"
cp -r "$root/co_detr" "$root/setup.py" "$work"
cp -r "$root/tests/__init__.py" "$root/tests/layers" "$work/tests"
rm -f "$work"/co_detr/_C*.so
cd "$work"

# One version of each kernel, so that every instrumented line is the one that runs.
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CFLAGS="$flags -DCO_DETR_ONE_VERSION" LDFLAGS="-fsanitize=address,undefined" CO_DETR_NO_CUDA=1 \
  "$python" setup.py -q build_ext --inplace

# Python itself is not built with the sanitizers, so they have to be there before it; its own
# memory is still reachable at exit, which is no leak of ours.
preload="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
[ $# -gt 0 ] || set -- --cases 2000
LD_PRELOAD="$preload" ASAN_OPTIONS="detect_leaks=0:halt_on_error=1" \
  UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1" PYTHONPATH="$work" \
  "$python" -m tests.layers.fuzz "$@"
