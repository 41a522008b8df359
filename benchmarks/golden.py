"""Compares the tokens and rewards of every method with those of an earlier commit, for changes that must keep them.

`python -m benchmarks.golden` decodes with the embedded model (4 minutes on two cores) and exits with 1 if a token or a
reward differs from results/golden_tokens.json; `--write` makes that file. Numbers are bit-identical on the same CPU,
instruction set and version of torch only, so the file names them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS
from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    Guidance,
    MixtureReward,
    RewardGuidedDecoder,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bundled import default_model

GOLDEN = RESULTS / "golden_tokens.json"
PROMPTS: list[Any] = [
    "How do I learn to swim?",
    [{"role": "user", "content": "Explain rainbows."}],
    "Write a short poem about rain.",
    "The sky is",
    "List three fruits:",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a prime?"}],
    list(range(100, 160)),
    "Once upon a time, in a small village by the sea, there lived an old woman who",
]
NEW_TOKENS = 16
MADE_BY = ("cpu", "torch", "transformers", "commit")


def methods(lm: str) -> Iterator[tuple[str, Any, str | None]]:
    """Name, reward and strategy; the language model itself serves the methods that need a second one."""
    own = SequenceReward("bundled:pargs", share_trunk=False)
    yield "unguided", None, None
    yield "pargs", "bundled:pargs", None
    yield "pargs, a model of its own", own, None
    yield "args", "bundled:args", None
    yield "farma", VocabularyReward(lm), None
    yield "genarm", AutoregressiveReward(lm), None
    yield "contrastive", ContrastiveReward(), None
    yield "mixture", MixtureReward([SequenceReward("bundled:pargs"), ContrastiveReward()], [1.0, 0.5]), None
    yield "best-of-n", "bundled:pargs", "best_of_n:n=3"
    yield "cards", own, "segment"
    yield "blockwise", own, "blockwise"


def decode() -> Iterator[tuple[str, list[Any]]]:
    """The name of each case, and tokens and reward of each of its rows."""
    lm = str(default_model(print))
    for dtype in ("float32", "bfloat16"):
        for name, reward, strategy in methods(lm):
            decoder = RewardGuidedDecoder.from_pretrained(lm, reward=reward, dtype=dtype, max_batch=3)
            if strategy is not None:
                rows = decoder.generate(PROMPTS[:4], NEW_TOKENS, strategy=strategy, seed=[1, 2, 3, 4])
                yield f"{dtype} {name}", [[row.tokens, row.reward] for row in rows]
                continue
            for temperature in (0, 0.8):
                guidance = Guidance(k=10, beta=1.0, temperature=temperature)
                rows = decoder.generate(PROMPTS, NEW_TOKENS, guidance, seed=list(range(len(PROMPTS))))
                yield f"{dtype} {name} τ={temperature}", [[row.tokens, row.reward] for row in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, default=GOLDEN)
    parser.add_argument("--write", action="store_true", help="make the file instead of comparing with it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made_by = {name: machine()[name] for name in MADE_BY}
    if given.write:
        lines = [
            json.dumps({"made_by": made_by}),
            *(json.dumps(case, ensure_ascii=False) for case in decode()),
        ]
        given.file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        return 0
    head, *cases = json.loads(given.file.read_text(encoding="utf-8"))
    print(f"golden file: {head['made_by']}\nhere:        {made_by}")
    expected, different = dict(cases), 0
    for name, rows in decode():
        same = rows == expected.pop(name, None)
        different += not same
        print(f"{name}: {'same' if same else 'DIFFERENT'}", flush=True)
    for name in expected:
        print(f"{name}: not decoded")
    return int(bool(different or expected))


if __name__ == "__main__":
    sys.exit(main())
