#!/usr/bin/env bash
# One round on a machine with an NVIDIA GPU, within 9 minutes and without downloads: tests, sanitizer, ops, decoding.
#   bash benchmarks/gpu.sh          results go to $OUT, or to benchmarks/results/gpu where OUT is not set
#   SHAPE=llama-8b bash benchmarks/gpu.sh decode profile        only these parts, with models of another size
# It needs torch with CUDA, which brings Triton, transformers and pytest; compute-sanitizer where it is to watch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-benchmarks/results/gpu}
shape=${SHAPE:-llama-1b}
parts=${*:-ops_tests steps_tests ops decode profile shared memcheck racecheck build tests}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
status=0
# Everything ends here, whatever the parts still want: the machine may be taken away soon after.
end=$((SECONDS + ${LIMIT:-530}))

# Runs a part, if it is asked for, for at most the given seconds; keeps its output and remembers a failure.
step() {
    local name=$1 limit=$2 code left=$((end - SECONDS))
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    if [ "$left" -lt 15 ]; then
        echo "== $name: left out, no time"
        status=1
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    local start=$SECONDS
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 20
    code=${PIPESTATUS[0]}
    echo "== $name: exit $code after $((SECONDS - start)) s"
    [ "$code" -eq 0 ] || status=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
python - <<'PY' || exit 2
import torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.__version__, torch.cuda.get_device_name())
PY

# Most of the first two is compiling: each configuration takes a second or more the first time.
step ops_tests 130 python -m pytest -q tests/gpu/test_ops_cuda.py tests/gpu/test_packing_cuda.py
step steps_tests 100 python -m pytest -q -m "not slow" tests/gpu/test_steps_cuda.py tests/gpu/test_decoder_cuda.py
step ops 80 python -m benchmarks.ops.gpu_ops --output "$out/gpu_ops.csv"
step decode 110 python -m benchmarks.decode --gpu --shape "$shape" --device cuda --output "$out/decode.csv"
step profile 90 python -m benchmarks.profile_step --shape "$shape" --kernels 15 --output "$out/profile.csv"
step shared 40 python -m benchmarks.decode --shared --shape "$shape" --device cuda --output "$out/shared.csv"
# Every kernel under the sanitizer, and torch's own memory pool out of the way, so that each tensor has its own bounds.
for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
        step $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool $tool --error-exitcode 1 python -m benchmarks.ops.sanitize
    else
        echo "== $tool: compute-sanitizer is not installed: the kernels are NOT watched"
    fi
done
# The C++ kernels need pybind11 and a compiler; without them the reference serves on the CPU.
step build 50 python setup.py build_ext --inplace
step tests 50 python -m pytest -q -m "not slow" tests/ops tests/decoding/test_ahead.py
exit $status
