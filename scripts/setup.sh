#!/usr/bin/env bash
# Makes the environment that Co-DETR runs in. Safe to run again: nothing happens while nothing changed.
#
#   VENV=.venv      environment to make, or an existing one to complete (virtualenv or conda prefix)
#   PYTHON=python3  interpreter that makes a new environment
#
# The extension's build switches (FORCE_CUDA, TORCH_CUDA_ARCH_LIST, CO_DETR_NO_CUDA, CO_DETR_NO_EXT)
# are passed on to setup.py. They are remembered: CO_DETR_NO_EXT=1 make setup; make test builds nothing.
# Without a GPU and without a word about CUDA in them, kernels are built for the CPU only: those for
# all GPUs that a toolkit knows take many minutes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
MIN_TORCH=2.4
BUILD_SWITCHES=(FORCE_CUDA TORCH_CUDA_ARCH_LIST CO_DETR_NO_CUDA CO_DETR_NO_EXT)

die() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

# phase LABEL REMEDY COMMAND...: runs the command into the log, prints one line with its time.
phase() {
    local label=$1 remedy=$2 start=$SECONDS
    shift 2
    printf '  %-58s ' "$label"
    printf '\n### %s\n' "$label" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        printf 'FAILED (%d s)\n\n' $((SECONDS - start))
        tail -n 20 "$LOG" | sed 's/^/    /' >&2
        printf '\n' >&2
        die "\"$label\" failed. $remedy (whole log: $LOG)"
    fi
    printf 'done (%d s)\n' $((SECONDS - start))
}

note() { printf '  %-58s %s\n' "$1" "$2"; }

# What the result depends on: requirements, build files, kernel sources, switches, locations.
inputs_hash() {
    local name
    {
        printf '%s\n' "$ROOT" "$(cd "$VENV" && pwd)"
        for name in "${BUILD_SWITCHES[@]}"; do printf '%s=%s\n' "$name" "${!name:-}"; done
        ! cpu_only || echo "CPU only"
        find requirements*.txt constraints.txt setup.py pyproject.toml \
            scripts/setup.sh co_detr/tools/detectron2.txt co_detr/layers/csrc -type f 2>/dev/null |
            LC_ALL=C sort | xargs sha256sum
    } | sha256sum | cut -d' ' -f1
}

# The stamp holds the hash on its first line, then the libraries that were built.
is_current() {
    local built
    [ -f "$STAMP" ] || return 1
    [ "$(head -n 1 "$STAMP")" = "$(inputs_hash)" ] || return 1
    while read -r built; do [ -f "$built" ] || return 1; done < <(tail -n +2 "$STAMP")
}

# A switch that is not set now keeps its value of the last finished set-up; set it to 0 to undo it.
recall_switches() {
    local name value
    [ -f "$SWITCHES" ] || return 0
    while IFS='=' read -r name value; do
        [ -n "${!name+set}" ] || export "$name=$value"
    done <"$SWITCHES"
}

remember_switches() {
    local name
    for name in "${BUILD_SWITCHES[@]}"; do
        [ -z "${!name:-}" ] || printf '%s=%s\n' "$name" "${!name}"
    done >"$SWITCHES"
}

# Whether nothing asks for CUDA kernels: no GPU (of Linux, of WSL), and no switch.
cpu_only() {
    [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ] && [ -z "${FORCE_CUDA:-}${TORCH_CUDA_ARCH_LIST:-}" ]
}

version_of() { "$PY" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null || true; }

STAMP=$VENV/.co_detr_setup
SWITCHES=$VENV/.co_detr_switches
LOG=$VENV/setup.log
PY=$VENV/bin/python

recall_switches
if [ -d "$VENV" ] && is_current; then
    echo "setup: $VENV is up to date"
    exit 0
fi

rm -f "$STAMP" # a set-up that fails half-way must not pass for a finished one
started=$SECONDS
echo "setup: environment $VENV"

# --- environment -------------------------------------------------------------------------------
if [ -x "$PY" ]; then
    : >"$LOG"
    note "use the existing environment" "ok"
else
    command -v "$PYTHON" >/dev/null ||
        die "'$PYTHON' was not found; install Python 3.10 or newer, or name one: make setup PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$PYTHON" --version 2>&1) is too old; Co-DETR needs Python 3.10 or newer: make setup PYTHON=/path/to/python3"
    mkdir -p "$VENV"
    : >"$LOG"
    phase "make the environment ($("$PYTHON" --version 2>&1))" \
        "On Debian and Ubuntu the package python3-venv is needed." \
        "$PYTHON" -m venv "$VENV"
    touch "$VENV/.co_detr_created"
fi
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$VENV holds $("$PY" --version 2>&1); Co-DETR needs Python 3.10 or newer: remove it or name another with VENV="

# The pins are for environments made here; somebody else's is completed, not changed.
CONSTRAINTS=()
[ -f "$VENV/.co_detr_created" ] && CONSTRAINTS=(-c constraints.txt)

pip_install() { "$PY" -m pip install --disable-pip-version-check --no-input "$@"; }
builds_extension() { [ "${CO_DETR_NO_EXT:-0}" = 0 ]; }
network_mend="Check the network and the free disk space, then run it again."

# --- compiler: asked for now, because torch takes minutes to arrive ------------------------------
if builds_extension; then
    command -v "${CXX:-g++}" >/dev/null ||
        die "the C++ compiler '${CXX:-g++}' was not found; install g++ (Debian and Ubuntu: apt-get install g++), or set CO_DETR_NO_EXT=1 to run on the slower pure-PyTorch operator"
    headers=$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -f "$headers/Python.h" ] ||
        die "the Python headers are missing ($headers/Python.h); install them (Debian and Ubuntu: apt-get install python3-dev), or set CO_DETR_NO_EXT=1"
fi

# --- PyTorch -----------------------------------------------------------------------------------
torch=$(version_of torch)
if [ -z "$torch" ]; then
    phase "install torch and torchvision (large: some minutes)" "$network_mend" \
        pip_install -c constraints.txt torch torchvision
else
    "$PY" -c "import re, sys; v = lambda s: [int(n) for n in re.findall(r'\d+', s)[:2]]
sys.exit(v('$torch') < v('$MIN_TORCH'))" ||
        die "$VENV holds torch $torch; Co-DETR needs torch $MIN_TORCH or newer: upgrade it, or name another environment with VENV="
    note "keep torch $torch" "ok"
    # Pinning the torch that is there makes pip choose the torchvision that belongs to it.
    [ -n "$(version_of torchvision)" ] ||
        phase "install the torchvision for torch $torch" "$network_mend" \
            pip_install "torch==$torch" torchvision
fi

# --- everything else ---------------------------------------------------------------------------
phase "install the other requirements" "$network_mend" \
    pip_install ${CONSTRAINTS[@]+"${CONSTRAINTS[@]}"} -r requirements.txt -r requirements-dev.txt

# --- Detectron2 --------------------------------------------------------------------------------
python_abs=$(cd "$(dirname "$PY")" && pwd)/python
phase "install Detectron2, unless there is one" \
    "$network_mend docs/get_started.md says how to use a source build instead." \
    "$python_abs" -m co_detr install-detectron2

# --- the package and its extension -------------------------------------------------------------
label="build the extension and install co_detr"
builds_extension || label="install co_detr without its extension"
install_package() (
    ! cpu_only || export CO_DETR_NO_CUDA=1
    pip_install --no-build-isolation --no-deps -e .
)
! { builds_extension && cpu_only; } ||
    note "no GPU is here: kernels for the CPU only" "FORCE_CUDA=1 builds CUDA's, too"
phase "$label" "CO_DETR_NO_CUDA=1 builds for CPU only, CO_DETR_NO_EXT=1 without any compiler." \
    install_package

{
    inputs_hash
    find co_detr -name '*.so' | LC_ALL=C sort
} >"$STAMP.part"
remember_switches
mv "$STAMP.part" "$STAMP"
echo "setup: ready after $((SECONDS - started)) s"
