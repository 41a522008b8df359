#!/usr/bin/env bash
# One round on a machine with an NVIDIA GPU, in two calls, without downloads: correctness first, then speed.
#
#   bash benchmarks/gpu.sh                          the first call: 9 minutes at most
#   bash benchmarks/gpu.sh second                   the second: 3 minutes at most; RESUME names the results of the first
#   bash benchmarks/gpu.sh gate ops                 only these parts
#   DEVICE=cpu SHAPE=tiny bash benchmarks/gpu.sh    tries the script out without a GPU
#
# Parts of the first call, the most important first: gate, tests and memcheck (in parallel), ops, 8b, 8b-shared,
# 8b-compiled, 8b-rows, 1b, profile, counters. If the gate fails, nothing else is run. Parts of the second call: tune,
# 8b-again, races. Measurements run alone, and each row is written as soon as it is measured.
# Results go to $OUT, by default benchmarks/results/gpu: CSV files to be copied to benchmarks/results, and round.log.
# Needs torch with CUDA (which brings Triton), transformers and pytest; ncu for counters, compute-sanitizer for memcheck
# and races. WHEELS=DIR first installs the wheels of a folder for this script alone. COMMIT names the commit where there
# is no git. SHAPE gives all decoding parts models of one size. RESUME=DIR copies the results of an earlier call.
# PATIENCE=N multiplies the seconds of every part, for slow machines.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${OUT:-benchmarks/results/gpu}
first="gate tests memcheck ops 8b 8b-shared 8b-compiled 8b-rows 1b profile counters"
second="tune 8b-again races"
limit_of_all=540
case "${*:-first}" in
    first) parts=$first ;;
    second) parts=$second limit_of_all=180 ;;
    *) parts=$* ;;
esac
for part in $parts; do
    case " $first $second " in *" $part "*) ;; *) echo "there is no part $part: choose of $first $second" >&2; exit 2 ;; esac
done

mkdir -p "$out"
scratch=$(mktemp -d)
background=
trap 'kill $background 2> /dev/null; rm -rf "$scratch"' EXIT
export RGTG_COMMIT=${COMMIT:-} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
status=0
running=()
# Everything ends at this time, even unfinished parts: the machine may be gone soon after.
patience=${PATIENCE:-1}
end=$((SECONDS + ${LIMIT:-$limit_of_all} * patience))

wanted() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# Writes a part's output to round.log and its last lines to the screen, and records a failure.
tell() {
    local name=$1 code=$2
    { echo "== $name: exit $code"; cat "$scratch/$name.log"; } >> "$out/round.log"
    tail -n "$([ "$code" -eq 0 ] && echo 12 || echo 40)" "$scratch/$name.log"
    echo "== $name: exit $code after $((SECONDS - start)) s, $((end - SECONDS)) s are left" | tee -a "$out/round.log"
    [ "$code" -eq 0 ] || status=1
}

# Sets the time limit of a part in seconds, at most what is left; fails where too little is left.
share() {
    local left=$((end - SECONDS))
    [ "$left" -ge 10 ] || { echo "== $1: left out, no time" | tee -a "$out/round.log"; status=1; return 1; }
    limit=$(($2 * patience < left ? $2 * patience : left))
}

# Runs a part alone, for at most the given seconds.
alone() {
    local name=$1 start=$SECONDS limit code
    wanted "$name" && share "$name" "$2" || return 0
    timeout "$limit" "${@:3}" > "$scratch/$name.log" 2>&1
    code=$?
    tell "$name" $code
    return $code
}

# Starts a part in the background. It is not timed and mostly compiles, so parts may run in parallel.
beside() {
    local part=$1 name=$2 limit
    wanted "$part" && share "$name" "$3" || return
    (timeout "$limit" "${@:4}" > "$scratch/$name.log" 2>&1; echo $? > "$scratch/$name.code") &
    running+=("$name:$!")
}

# Waits for all background parts.
together() {
    local start=$1 entry
    for entry in "${running[@]}"; do
        wait "${entry##*:}"
        tell "${entry%:*}" "$(cat "$scratch/${entry%:*}.code")"
    done
    running=()
}

# Whether a part is wanted and its CUDA tool is installed; reports a tool that is missing.
watched() {
    local name=$1 tool=$2
    wanted "$name" || return 0
    command -v "$tool" > /dev/null && return 0
    echo "== $name: $tool is not installed: the kernels are NOT watched" | tee -a "$out/round.log"
    return 1
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
missing = [name for name in ("triton", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
if missing:
    print("missing, parts that need them will fail (WHEELS=DIR brings them):", ", ".join(missing))
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability())
PY
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 2

alone gate 60 "$python" -m benchmarks.ops.gate --device "$device" || {
    echo "the gate is shut: nothing else is run" | tee -a "$out/round.log"
    exit 1
}

# Decoding: NAME of a round's cells, at most so many seconds, and more arguments.
decode() { alone "$1" "$3" "$python" -m benchmarks.decode --round "$2" ${SHAPE:+--shape "$SHAPE"} --device "$device" \
    --output "$out/decode_gpu.csv" "${@:4}"; }

# No pytest plugins: the project's options name one that may be missing here, and other plugins may be slow or broken.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
tests=("$python" -m pytest -o addopts= -q -ra --strict-markers --import-mode=importlib)
begun=$SECONDS
for dtype in float32 bfloat16 "float16 and not bfloat16"; do  # a name with bfloat16 in it has float16 in it
    for kernels in tree_attention "not tree_attention"; do
        name=ops_${dtype// /_}_${kernels// /_}
        beside tests "$name" 130 "${tests[@]}" tests/gpu/test_ops_cuda.py -k "$dtype and $kernels"
    done
done
beside tests ops_others 130 "${tests[@]}" tests/gpu/test_ops_cuda.py -k "not float32 and not float16"
beside tests steps 130 "${tests[@]}" -m "not slow" tests/gpu/test_steps_cuda.py tests/gpu/test_decoder_cuda.py
beside tests training 130 "${tests[@]}" tests/gpu/test_packing_cuda.py tests/gpu/test_vocabulary_cuda.py
# Every kernel under the sanitizer, without torch's memory pool, so that each tensor has its own bounds.
if watched memcheck compute-sanitizer; then
    beside memcheck memcheck 130 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
        --report-api-errors no --error-exitcode 1 "$python" -m benchmarks.ops.sanitize
fi
# Meanwhile the compiler fills its cache on disk. Its measurements are discarded, and it ends with the tests.
if wanted tests && wanted 8b-compiled; then
    timeout 130 "$python" -m benchmarks.decode --round 8b-compiled ${SHAPE:+--shape "$SHAPE"} --device "$device" \
        --output "$scratch/warm.csv" > /dev/null 2>&1 &
    background=$!
fi
together "$begun"
[ -z "$background" ] || { kill "$background" 2> /dev/null; wait "$background" 2> /dev/null; background=; }

if [ "$device" = cuda ]; then
    alone ops 70 "$python" -m benchmarks.ops.gpu_ops --output "$out/gpu_ops.csv" \
        --ops tree_attention topk_logprobs linear add_rms_norm rope_and_store act_and_mul commit finish_step score_and_sample resample \
        partial_bt_loss
fi
decode 8b 8b 60
decode 8b-shared 8b-shared 45
decode 8b-compiled 8b-compiled 80
decode 8b-rows 8b-rows 50
decode 1b 1b 70
alone profile "${PROFILE:-60}" "$python" -m benchmarks.profile_step --shape "${SHAPE:-llama-8b}" --device "$device" --kernels 15 \
    --output "$out/profile_gpu.csv"
# Hardware counters of one launch of every kernel, named by its op and shape.
metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics=$metrics,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
if [ "$device" = cuda ] && watched counters ncu; then
    alone counters 45 ncu --clock-control none --csv --log-file "$out/counters.csv" --metrics "$metrics" --nvtx \
        --print-nvtx-rename kernel -k 'regex:(tree_attention|topk_)' \
        "$python" -m benchmarks.ops.gpu_ops --once --ops tree_attention topk_logprobs
fi

# The second call: other block shapes, decoding again, and a race check of the kernels.
if [ "$device" = cuda ]; then alone tune 80 "$python" -m benchmarks.ops.tune --output "$out/tune.csv"; fi
decode 8b-again 8b 60 --fresh
begun=$SECONDS
for tool in racecheck initcheck; do
    if watched races compute-sanitizer; then
        beside races $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
            "$python" -m benchmarks.ops.sanitize
    fi
done
together "$begun"
exit $status
