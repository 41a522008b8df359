#!/usr/bin/env bash
# One round on a machine with an NVIDIA GPU, within 9 minutes and without downloads: tests, the ops, then decoding.
#   bash benchmarks/gpu.sh          results go to $OUT, or to benchmarks/results/gpu where OUT is not set
# It needs torch with CUDA, which brings Triton, transformers and pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0

# Runs a command for at most the given seconds, keeps its output, and remembers a failure without ending the round.
step() {
    local name=$1 limit=$2 code
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
    code=${PIPESTATUS[0]}
    echo "== $name: exit $code"
    [ "$code" -eq 0 ] || status=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
python - <<'PY' || exit 2
import torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.__version__, torch.cuda.get_device_name())
PY

# Most of this is compiling: each configuration takes a second or more the first time.
step gpu 190 python -m pytest -q tests/gpu
step ops 100 python -m benchmarks.ops.gpu_ops --output "$out/gpu_ops.csv"
# The C++ kernels need pybind11 and a compiler; without them the reference serves on the CPU.
step build 50 python setup.py build_ext --inplace
step tests 50 python -m pytest -q -m "not slow" tests/ops tests/evaluation
step decode 100 python -m benchmarks.decode --gpu --shape llama-1b --device cuda --output "$out/decode.csv"
step shared 50 python -m benchmarks.decode --shared --shape llama-1b --device cuda --output "$out/shared.csv"
exit $status
