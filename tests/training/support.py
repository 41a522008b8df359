"""Pairs that a tiny model can learn and models on disk, for the tests of training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from rgtg_fast.training.data import TokenizedPair
from tests.conftest import make_lm, make_tokenizer
from tests.covering import daily

needs_loaded_heads = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers 5.17 leaves the heads of an adapter folder at random",
)
EOS = 1
CHOSEN, REJECTED = range(6, 10), range(34, 38)


def tokenized(count: int, seed: int = 0, longest: int = 9) -> list[TokenizedPair]:
    """Pairs whose chosen answers use other words than their rejected ones."""
    draw = random.Random(seed)
    pairs = []
    for index in range(count):
        prompt = [draw.choice(range(6, 58)) for _ in range(draw.randint(1, 6))]
        chosen = [draw.choice(CHOSEN) for _ in range(draw.randint(1, longest))]
        rejected = [draw.choice(REJECTED) for _ in range(draw.randint(1, longest))]
        pairs.append(TokenizedPair(prompt, [*chosen, EOS], [*rejected, EOS], index))
    return pairs


def settings_by_day(*cases: dict[str, Any]) -> list[Any]:
    """Settings of a training of which the default run has every field, and every value that is no number."""

    def shows(settings: dict[str, Any]) -> set[tuple[str, Any]]:
        return {(key, value if isinstance(value, (str, bool)) else None) for key, value in settings.items()}

    return daily([(case,) for case in cases], shows)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as texts: rows of a preference file."""
    draw = random.Random(seed)

    def words(of: range) -> str:
        return " ".join(f"w{draw.choice(of) - 6}" for _ in range(draw.randint(1, 9)))

    return [
        {"prompt": words(range(6, 58)), "chosen": words(CHOSEN), "rejected": words(REJECTED)}
        for _ in range(count)
    ]


def save_lm(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> Path:
    """A tiny language model with its tokenizer on disk."""
    make_lm(dtype=dtype, **{"num_hidden_layers": 3, **settings}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
