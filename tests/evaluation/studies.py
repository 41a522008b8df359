"""Tiny models on disk, and studies over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rgtg_fast.evaluation.study.settings import Study
from tests.conftest import make_lm, make_rm, make_tokenizer

PROMPTS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10", "w11 w12 w13")


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def models(folder: Path) -> dict[str, str]:
    """A language model, another policy, a guide and a judge."""
    return {
        "lm": saved(make_lm(), folder / "lm"),
        "policy": saved(make_lm(seed=7), folder / "policy"),
        "guide": saved(make_rm(seed=1), folder / "guide"),
        "judge": saved(make_rm(seed=2), folder / "judge"),
    }


def study(folder: Path, named: dict[str, str], **changes: Any) -> Study:
    """Two samples of six tokens to five prompts, without and with a guide."""
    values: dict[str, Any] = {
        "output": str(folder / "out"),
        "prompts": list(PROMPTS),
        "model": named["lm"],
        "judges": {"judge": named["judge"]},
        "seeds": [0, 1],
        "max_new_tokens": 6,
        "batch_size": 4,
        "dtype": "float32",
        "methods": [
            {"name": "unguided", "support": "all"},
            {"name": "greedy", "greedy": True},
            {"name": "pargs", "reward": named["guide"], "beta": [1, 4], "top_k": 5},
            {"name": "best", "reward": named["guide"], "best_of": 3},
        ],
    }
    return Study.of(values | changes)
