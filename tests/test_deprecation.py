"""Names that were changed keep working for one release, and warn with the new one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rgtg_fast
from rgtg_fast import ContrastiveReward, Guidance, MixtureReward, RewardGuidedDecoder, RGTGError, Segments
from rgtg_fast.engine.strategies import named_strategy
from rgtg_fast.rewards import Reward
from tests.conftest import make_lm, make_tokenizer

GREEDY = Guidance(k=5, beta=2.0, temperature=0)


def renamed(old: str, new: str) -> Any:
    return pytest.warns(DeprecationWarning, match=f"{old} is now {new}")


def load(**settings: Any) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), **settings)


def test_a_public_name() -> None:
    with renamed("rgtg_fast.Piece", "StreamChunk"):
        assert rgtg_fast.Piece is rgtg_fast.StreamChunk


def test_keywords_of_from_pretrained() -> None:
    with renamed("join_products=", "fuse_projections="):
        load(join_products=False)
    with renamed("join_products=", "fuse_projections="), pytest.raises(RGTGError, match="pass one of them"):
        load(join_products=False, fuse_projections=False)


def test_an_attribute_of_the_decoder() -> None:
    decoder = load()
    with renamed("RewardGuidedDecoder.ahead", "max_in_flight"):
        decoder.ahead = 1
    assert decoder.max_in_flight == 1
    with renamed("RewardGuidedDecoder.ahead", "max_in_flight"):
        assert decoder.ahead == 1


@pytest.mark.parametrize(
    ("old", "new"), [("shortest", "min_tokens"), ("longest", "max_tokens"), ("rejections", "max_rejections")]
)
def test_settings_of_segments(old: str, new: str) -> None:
    with renamed(f"{old}=", f"{new}="):
        strategy = Segments(**{old: 9})  # type: ignore[arg-type]
    assert strategy == Segments(**{new: 9})  # type: ignore[arg-type]
    with renamed(f"Segments.{old}", new):
        assert getattr(strategy, old) == 9
    with renamed(f"{old}=", f"{new}="):
        assert named_strategy(f"segment:{old}=9") == strategy


def old_class(**members: Any) -> type[ContrastiveReward]:
    return type("Mine", (ContrastiveReward,), members)


def test_hooks_of_a_reward_class() -> None:
    """A subclass as it was written for the old names decodes like one for the new ones."""

    def begin(self: Any, context_logits: torch.Tensor) -> None:
        self.seen = tuple(context_logits.shape[:2])
        ContrastiveReward.begin_step(self, context_logits)

    with pytest.warns(DeprecationWarning, match="is now") as told:
        old = old_class(observe=begin, wide=True, contexts=2)
    messages = sorted(str(warning.message).partition(":")[0] for warning in told)
    assert messages == [
        "Mine.contexts is now prompt_contexts",
        "Mine.observe is now begin_step",
        "Mine.wide is now scores_vocabulary",
    ]
    reward = old("w1 w2", "w3")
    rows = load(reward=reward).generate("w4 w5", 6, GREEDY)
    assert reward.seen == (1, 2)  # pyright: ignore[reportAttributeAccessIssue]
    assert (
        rows[0].tokens == load(reward=ContrastiveReward("w1 w2", "w3")).generate("w4 w5", 6, GREEDY)[0].tokens
    )
    with renamed("Reward.wide", "scores_vocabulary"):
        assert reward.wide is True
    with renamed("Reward.contexts", "prompt_contexts"):
        assert reward.contexts == 2


def test_an_old_hook_calls_that_of_its_parent() -> None:
    called: list[str] = []

    class Parent(ContrastiveReward):
        def begin_step(self, context_logits: torch.Tensor) -> None:
            called.append("parent")

    with renamed("Older.observe", "begin_step"):

        class Older(Parent):
            def observe(self, context_logits: torch.Tensor) -> None:
                called.append("older")
                super().observe(context_logits)  # type: ignore[misc]

    class Newest(Older):
        def begin_step(self, context_logits: torch.Tensor) -> None:
            called.append("newest")
            super().begin_step(context_logits)

    with renamed("Parent.observe", "begin_step"):
        Newest("w1", "w2").begin_step(torch.zeros(1))
    assert called == ["newest", "older", "parent"]


def test_a_fused_draw_of_a_reward_class() -> None:
    calls = []

    def choose(self: Any, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        calls.append(len(arguments))
        with renamed("Reward.choose", "sample"):
            return super(old, self).choose(*arguments)

    with renamed("Mine.choose", "sample"):
        old = old_class(choose=choose, fused=True)
    rows = load(reward=old("w1 w2", "w3")).generate("w4 w5", 6, GREEDY)
    assert calls == [6] * rows.stats.steps


def test_the_cache_of_a_reward_class_from_before_it_counted_rows() -> None:
    """It states bytes per token, and its `reserve` takes no `undo`; a mixture holds it."""

    def reserve(self: Any, slots: int, length: int) -> None:
        self.reserved = (slots, length)
        ContrastiveReward.reserve(self, slots, length)

    old = old_class(cache_bytes_per_token=7, reserve=reserve)("w1 w2", "w3")
    with renamed("Mine.cache_bytes_per_token", r"row_bytes\(length, undo\)"):
        assert Reward.row_bytes(old, 10) == 70
    mixture = MixtureReward([old])
    with pytest.warns(DeprecationWarning, match="cache_bytes_per_token"):
        load(reward=mixture).generate("w4 w5", 3, GREEDY)
    (part,) = mixture.rewards
    assert part.reserved[0] > 0  # pyright: ignore[reportAttributeAccessIssue]
