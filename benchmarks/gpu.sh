#!/usr/bin/env bash
# One round on a machine with an NVIDIA GPU, within 9 minutes and without downloads: correctness first, then speed.
#
#   bash benchmarks/gpu.sh                                             everything, with models of Llama-3.2-1B's sizes
#   SHAPE=llama-8b bash benchmarks/gpu.sh decode profile shared        only these parts, with models of another size
#   DEVICE=cpu SHAPE=tiny bash benchmarks/gpu.sh decode profile        tries the script out where there is no GPU
#   BEGIN=1 bash benchmarks/gpu.sh decode                              begins no cell later than after a second
#
# Parts: ops_tests steps_tests host_tests memcheck racecheck (side by side), ops decode profile shared counters (alone);
# where it is named, also tune: other block shapes of tree_attention.
# Results go to $OUT, or to benchmarks/results/gpu: CSV files to be copied to benchmarks/results, and round.log.
# It needs torch with CUDA, which brings Triton, transformers and pytest; ncu and compute-sanitizer where they are to
# watch. WHEELS=DIR installs the wheels of a folder beside it first. COMMIT names the commit where there is no git.
# RESUME=DIR takes an earlier round's CSV files along: decoding goes on where they end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
shape=${SHAPE:-llama-1b}
out=${OUT:-benchmarks/results/gpu}
parts=${*:-ops_tests steps_tests host_tests memcheck racecheck ops decode profile shared counters}
# Seconds of the parts that depend on the models' size, where they are not the only ones.
case $shape in
    llama-8b) decode=${DECODE:-230} profile=${PROFILE:-190} shared=${SHARED:-90} ;;
    *) decode=${DECODE:-120} profile=${PROFILE:-90} shared=${SHARED:-60} ;;
esac

mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export RGTG_COMMIT=${COMMIT:-} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
status=0
running=()
# Everything ends here, whatever the parts still want: the machine may be taken away soon after.
end=$((SECONDS + ${LIMIT:-530}))

wanted() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# Puts a part's output into round.log and its end on the screen, and remembers a failure.
tell() {
    local name=$1 code=$2
    { echo "== $name: exit $code"; cat "$scratch/$name.log"; } >> "$out/round.log"
    tail -n "$([ "$code" -eq 0 ] && echo 12 || echo 40)" "$scratch/$name.log"
    echo "== $name: exit $code after $((SECONDS - start)) s"
    [ "$code" -eq 0 ] || status=1
}

# Seconds that a part may take of those that it asks for; fails where too few are left.
share() {
    local left=$((end - SECONDS))
    [ "$left" -ge 10 ] || { echo "== $1: left out, no time" | tee -a "$out/round.log"; status=1; return 1; }
    limit=$(($2 < left ? $2 : left))
}

# Runs a part alone, for at most the given seconds.
alone() {
    local name=$1 start=$SECONDS limit
    wanted "$name" && share "$name" "$2" || return
    timeout "$limit" "${@:3}" > "$scratch/$name.log" 2>&1
    tell "$name" $?
}

# Begins a part that may share the machine: what it takes is mostly compiling, and nothing of it is timed.
beside() {
    local part=$1 name=$2 limit
    wanted "$part" && share "$name" "$3" || return
    (timeout "$limit" "${@:4}" > "$scratch/$name.log" 2>&1; echo $? > "$scratch/$name.code") &
    running+=("$name")
}

# Waits for all that was begun.
together() {
    local start=$1 name
    wait
    for name in "${running[@]}"; do tell "$name" "$(cat "$scratch/$name.code")"; done
    running=()
}

: > "$out/round.log"
[ -z "${RESUME:-}" ] || cp "$RESUME"/*.csv "$out"/
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH=$PYTHONPATH:$scratch/site
fi
if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee -a "$out/round.log"
fi
"$python" - "$device" << 'PY' 2>&1 | tee -a "$out/round.log"
import importlib.util, os, sys
import torch, transformers
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores")
missing = [name for name in ("triton", "pytest", "hypothesis", "pybind11", "setuptools") if importlib.util.find_spec(name) is None]
if missing:
    print("missing, parts that need them will fail (WHEELS=DIR brings them):", ", ".join(missing))
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability())
PY
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 2

# No plugins: the project's options name one that may be missing here, and others' may be slow or broken.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
tests=("$python" -m pytest -o addopts= -q -ra --strict-markers --import-mode=importlib)
begun=$SECONDS
for kernels in tree_attention topk_logprobs "not tree_attention and not topk_logprobs"; do
    beside ops_tests "ops_tests_${kernels// /_}" 150 "${tests[@]}" tests/gpu/test_ops_cuda.py -k "$kernels"
done
beside steps_tests steps_tests 150 "${tests[@]}" -m "not slow" tests/gpu/test_steps_cuda.py tests/gpu/test_decoder_cuda.py
beside steps_tests compiled_tests 150 "${tests[@]}" -m slow tests/gpu/test_steps_cuda.py
beside steps_tests training_tests 150 "${tests[@]}" tests/gpu/test_packing_cuda.py tests/gpu/test_vocabulary_cuda.py
# The C++ kernels need pybind11 and a compiler; without them the reference serves on the CPU.
beside host_tests host_tests 150 bash -c '"$0" setup.py -q build_ext --inplace; exec "$@"' "$python" \
    "${tests[@]}" -m "not slow and not triton" --continue-on-collection-errors tests/ops tests/decoding/test_ahead.py
# Every kernel under the sanitizer, and torch's own memory pool out of the way, so that each tensor has its own bounds.
for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
        beside $tool $tool 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool $tool --error-exitcode 1 "$python" -m benchmarks.ops.sanitize
    elif wanted $tool; then
        echo "== $tool: compute-sanitizer is not installed: the kernels are NOT watched" | tee -a "$out/round.log"
    fi
done
together "$begun"

alone ops 80 "$python" -m benchmarks.ops.gpu_ops --output "$out/gpu_ops.csv"
alone decode "$decode" "$python" -m benchmarks.decode --gpu --shape "$shape" --device "$device" \
    --seconds "${BEGIN:-$((decode - 25))}" --output "$out/decode_gpu_$shape.csv"
alone profile "$profile" "$python" -m benchmarks.profile_step --shape "$shape" --device "$device" --kernels 15 \
    --output "$out/profile_gpu_$shape.csv"
alone shared "$shared" "$python" -m benchmarks.decode --gpu --shared --shape "$shape" --device "$device" \
    --seconds "${BEGIN:-$((shared - 15))}" --output "$out/decode_gpu_$shape.csv"
# What the hardware counted in one launch of every kernel at every size.
counters=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
counters=$counters,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
if command -v ncu > /dev/null; then
    alone counters 60 ncu --clock-control none --csv --log-file "$out/counters.csv" --metrics "$counters" \
        -k 'regex:(split|merge|segment|resample|commit|reward_tail|pair|sum)_kernel' "$python" -m benchmarks.ops.gpu_ops --once
elif wanted counters; then
    echo "== counters: ncu is not installed: nothing was counted" | tee -a "$out/round.log"
fi
# Only where it is named: what other block shapes would bring.
alone tune 240 "$python" -m benchmarks.ops.tune --output "$out/tune.csv"
exit $status
