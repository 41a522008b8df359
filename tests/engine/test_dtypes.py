"""Neither torch's default dtype nor an autocast context around a call changes what comes out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import Guidance, RewardGuidedDecoder
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
REWARDS = ("none", "rm", "text:rm", "genarm:lm", "adapter", "contrastive")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dtypes")
    for name, model in (("lm", make_lm()), ("rm", make_rm())):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    write_adapter(root / "adapter", make_lm(), fork=1)
    return root


def results(
    folder: Path,
    reward: str,
    loading: AbstractContextManager[Any],
    calling: AbstractContextManager[Any],
    engine: str,
) -> str:
    kind, colon, name = reward.rpartition(":")
    source = f"{kind}{colon}{folder / name}" if (folder / name).is_dir() else reward
    guide = None if reward == "none" else source
    with loading:
        decoder = RewardGuidedDecoder.from_pretrained(folder / "lm", reward=guide, engine=engine)
    with calling:
        rows = decoder.generate(["w1 w2", "w3"], 4, Guidance(k=8, beta=2.0, temperature=0.7), seed=3)
        found: list[Any] = [(row.tokens, row.rewards, row.logprobs) for row in rows]
        found.append([piece.token for piece in decoder.stream("w1 w2", 3)])
        if guide is not None:
            found.append(decoder.score(["w1"], ["w2 w3"]))
            strategies = ("best_of_n:n=2", "segment", "blockwise") if reward == "rm" else ("best_of_n:n=2",)
            found += [decoder.generate("w1", 3, strategy=strategy)[0].tokens for strategy in strategies]
    return repr(found)


@pytest.mark.parametrize(
    ("reward", "engine"), [*((reward, "auto") for reward in REWARDS), ("adapter", "transformers")]
)
def test_results_are_those_without(reward: str, engine: str, folder: Path) -> None:
    nothing = contextlib.nullcontext()
    expected = results(folder, reward, nothing, nothing, engine)
    for name, context in CONTEXTS.items():
        assert results(folder, reward, context(), context(), engine) == expected, name


def test_a_caller_keeps_its_autocast_between_steps() -> None:
    inside = []

    def reward(prefixes: object, candidates: torch.Tensor) -> torch.Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(candidates.shape)

    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), reward=reward)
    with torch.autocast("cpu", torch.bfloat16):
        running = decoder.stream("w1", 4)
        for _ in range(2):
            next(running)
            assert torch.is_autocast_enabled("cpu")
        running.close()
        assert torch.is_autocast_enabled("cpu")
        assert list(decoder.stream("w1", 3))
        assert torch.is_autocast_enabled("cpu")
    assert len(inside) >= 3
    assert not any(inside)
