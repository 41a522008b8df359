"""What the decoder's tests share."""

from __future__ import annotations

import random


def prompts_of(count: int, seed: int = 0, longest: int = 11) -> list[list[int]]:
    """Prompts of 1 to `longest` random tokens of the tests' small vocabulary."""
    rng = random.Random(seed)
    return [[rng.randrange(6, 64) for _ in range(rng.randrange(1, longest + 1))] for _ in range(count)]
