#!/usr/bin/env bash
# Tries a wheel as a user without a compiler would: in a new environment, from nothing to pictures.
#
#   bash scripts/check_wheel.sh dist/co_detr-0.2.0-cp310-abi3-linux_x86_64.whl [TORCH]
#
#   PYTHON=python3   interpreter that makes the environment
#   FOLDER=...       where it and the results go; by default a temporary folder, which is removed
#
# TORCH is a version of PyTorch, such as 2.10.0; without it, pip takes the newest. It takes 5 GB of
# disk and some minutes, most of them for PyTorch.
set -euo pipefail

wheel=$(realpath "$1")
torch=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
if [ -z "${FOLDER:-}" ]; then
    FOLDER=$(mktemp -d)
    trap 'rm -rf "$FOLDER"' EXIT
fi
mkdir -p "$FOLDER" && cd "$FOLDER"

# What runs in here finds these programs and no compiler.
mkdir -p bin
for program in bash sh cat date du head ldconfig ls tail uname; do
    ln -sf "$(command -v "$program")" bin/
done
export PATH=$FOLDER/bin
for compiler in cc c++ gcc g++ clang nvcc; do
    ! command -v "$compiler" || { echo "there is a $compiler on PATH" >&2 && exit 1; }
done

step() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

step "install the wheel: $("$python" --version), torch ${torch:-(newest)}"
"$python" -m venv env
log=install.log
env/bin/python -m pip install --disable-pip-version-check --no-input \
    "$wheel[quickstart]" ${torch:+"torch==$torch"} >"$log" 2>&1 || { tail -n 20 "$log" && exit 1; }
export PATH=$FOLDER/env/bin:$PATH
echo "$(du -sh env)"

step "add Detectron2"
co-detr install-detectron2 >>"$log" 2>&1 || { tail -n 20 "$log" && exit 1; }
co-detr info | head -n 12

step "the operator against its reference"
env/bin/python -W ignore - <<'PYTHON'
import torch
from co_detr.layers import ms_deform_attn, ms_deform_attn_reference
from co_detr.layers.deformable_attention import KERNEL_DEVICES

assert "cpu" in KERNEL_DEVICES, "the wheel's kernels did not load"
torch.manual_seed(0)
shapes = [(20, 24), (10, 12), (5, 6)]
value = torch.randn(2, sum(h * w for h, w in shapes), 4, 8, dtype=torch.float64)
locations = torch.rand(2, 37, 4, 3, 4, 2, dtype=torch.float64) * 1.2 - 0.1
weights = torch.rand(2, 37, 4, 3, 4, dtype=torch.float64)
inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
results = []
for operator in (ms_deform_attn, ms_deform_attn_reference):
    output = operator(inputs[0], shapes, *inputs[1:])
    results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
print(f"torch {torch.__version__}: the largest difference is {worst:.1e} of the largest value")
assert worst < 1e-12
PYTHON

step "train 20 iterations, and evaluate"
co-detr digits --train 80 --val 20
co-detr train --config-file quickstart train.max_iter=20 train.eval_period=20 train.output_dir=run >run.log 2>&1 ||
    { tail -n 20 run.log && exit 1; }
tail -n 3 run.log

step "predict"
checkpoint=${CHECKPOINT:-run/model_final.pth}
co-detr predict --config-file run/config.yaml --checkpoint "$checkpoint" \
    datasets/digits/val --output drawn >predict.log 2>&1 || { tail -n 20 predict.log && exit 1; }
tail -n 2 predict.log
ls drawn | head -n 5
step "done"
