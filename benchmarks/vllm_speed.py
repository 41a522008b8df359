"""Tokens per second of a guided vLLM engine against the same engine unguided, into results/vllm.csv.

python -m benchmarks.vllm_speed [--threads 2] [--tokens 64] [--rounds 5]

Runs in an environment with vLLM. One engine per reward; in every round the same prompts are answered guided and
unguided (`rgtg=0`), in turns. Greedy answers are compared with `RewardGuidedDecoder`'s before anything is timed.
Rewards: `pargs`, the bundled adapter merged into a model as large as the base model, with k=10 candidates; `genarm
small`, a random model over the same tokens with 2 layers of width 64, whose speed is that of a trained one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "vllm.csv"
# Every child of this process is an engine of its own.
RUN = "RGTG_VLLM_SPEED_REWARD"
MACHINE = (
    *("cpu", "isa", "peer_isa", "cores", "threads", "gpu"),
    *("python", "torch", "transformers", "rgtg_fast", "commit"),
)
CELL = ("reward", "k", "support", "concurrency", "prompt_tokens", "new_tokens", "rounds")
COLUMNS = (
    "date",
    *MACHINE,
    "vllm",
    "model",
    "dtype",
    *CELL,
    "unguided_tokens_per_second",
    "guided_tokens_per_second",
)
COLUMNS += ("guided_over_unguided", "lowest_ratio", "highest_ratio", "equal_to_decoder")
TOPICS = ("bread", "rivers", "chess", "the moon", "bicycles", "gardens", "music", "winter")
LINE = (
    "Explain in plain words what one should know about {topic}, and why people care about it so much today."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if os.environ.get(RUN):
        measure(os.environ[RUN], args.tokens, args.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        small = save_small(Path(folder))
        for name, reward in (("pargs", "bundled:pargs"), ("genarm small", f"genarm:{small}")):
            environment = {
                "RGTG_FAST_REWARD": reward,
                RUN: name,
                "OMP_NUM_THREADS": str(args.threads),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
            command = [sys.executable, "-m", "benchmarks.vllm_speed", *sys.argv[1:]]
            subprocess.run(command, env={**os.environ, **environment}, check=True)


def save_small(folder: Path) -> Path:
    """A small random language model over the base model's tokens, for a vocabulary reward."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from rgtg_fast.bundled import default_model

    tokenizer = AutoTokenizer.from_pretrained(default_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, tokens: int, rounds: int) -> None:
    """All cells of one reward, in an engine of this process."""
    import vllm
    from vllm import LLM, SamplingParams

    from rgtg_fast import Guidance, RewardGuidedDecoder
    from rgtg_fast.bench.roofline import machine
    from rgtg_fast.bundled import default_model

    model, reward = str(default_model()), os.environ["RGTG_FAST_REWARD"]
    llm = LLM(
        model,
        logits_processors=["rgtg_fast.integrations.vllm:RewardGuide"],
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=8,
        max_model_len=512,
        generation_config="vllm",
        enable_prefix_caching=False,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer(LINE.format(topic=topic))["input_ids"] for topic in TOPICS]
    guidance = Guidance(k=10, beta=1.0, temperature=0, support="lm" if name == "pargs" else "all")
    guided = {"rgtg_k": guidance.k, "rgtg_beta": guidance.beta, "rgtg_support": guidance.support}

    def answer(concurrency: int, arguments: dict[str, Any]) -> tuple[float, list[list[int]]]:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=arguments
        )
        given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts[:concurrency]]
        began = time.perf_counter()
        outputs = llm.generate(given, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return sum(map(len, answers)) / seconds, answers

    decoder = RewardGuidedDecoder.from_pretrained(model, reward=reward, dtype="float32")
    wanted = [row.tokens for row in decoder.generate(prompts, tokens, guidance)]
    found = answer(len(prompts), guided)[1]
    # The engine goes on behind an end-of-sequence token, so that both sides decide the same number of tokens.
    equal = all(got[: len(want)] == want for got, want in zip(found, wanted, strict=True))
    del decoder
    described = machine()
    common = {key: described.get(key) for key in MACHINE} | {
        "date": datetime.date.today().isoformat(),
        "vllm": vllm.__version__,
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "reward": name,
        "k": guidance.k,
        "support": guidance.support,
        "new_tokens": tokens,
        "rounds": rounds,
        "equal_to_decoder": equal,
    }
    for concurrency in (1, 8):
        answer(concurrency, guided)
        pairs = [(answer(concurrency, {"rgtg": 0})[0], answer(concurrency, guided)[0]) for _ in range(rounds)]
        write(common | {"concurrency": concurrency, "prompt_tokens": len(prompts[0])} | summary(pairs))


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians over the rounds, and the range of the ratios."""
    ratios = [guided / unguided for unguided, guided in pairs]
    return {
        "unguided_tokens_per_second": round(statistics.median(pair[0] for pair in pairs), 2),
        "guided_tokens_per_second": round(statistics.median(pair[1] for pair in pairs), 2),
        "guided_over_unguided": round(statistics.median(ratios), 3),
        "lowest_ratio": round(min(ratios), 3),
        "highest_ratio": round(max(ratios), 3),
    }


def write(row: dict[str, Any]) -> None:
    """Appends a row to the results."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print({name: row[name] for name in COLUMNS[COLUMNS.index("reward") :]}, flush=True)


if __name__ == "__main__":
    main()
