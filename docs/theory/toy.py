"""A world small enough to enumerate: V tokens, answers of n tokens, every probability and every reward a table.

A `Tables` holds a value for each prefix: table i has V^i entries in lexicographic order, so the prefixes that continue
prefix a are a·V … a·V + V − 1, and table 0 has the empty prefix alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from rgtg_fast import FunctionReward, Guidance, RewardGuidedDecoder
from rgtg_fast.training.losses import Objective

Tables = list[Tensor]
PROMPT = 0  # the token that stands for x


@dataclass(frozen=True)
class World:
    """A base model, a true reward, and preferences between answers that the base model generates.

    Attributes:
        model: the base model, in float64. vocabulary: V. length: n.
        conditionals: table i holds π(v | x, y_{1:i}), `[V^i, V]`.
        base: π(y | x) of every answer, `[V^n]`. reward: r*(x, y) of every answer, `[V^n]`.
        wins: `[V^n, V^n]`, the chance to draw answers y and y' from π and to be told that y is better:
            π(y) π(y') σ(r*(y) − r*(y')).
    """

    model: LlamaForCausalLM
    vocabulary: int
    length: int
    conditionals: Tables
    base: Tensor
    reward: Tensor
    wins: Tensor

    @cached_property
    def whole(self) -> Tensor:
        """The minimum of both Bradley-Terry losses on whole answers, `[V^n]`: r* up to a constant."""
        return bradley_terry(self.wins)

    @property
    def answers(self) -> Tensor:
        """All answers, `[V^n, n]` int64."""
        return answers_of(self.vocabulary, self.length)


def answers_of(vocabulary: int, length: int) -> Tensor:
    """Every sequence of so many tokens, in lexicographic order, `[V^n, n]` int64."""
    return torch.tensor(list(product(range(vocabulary), repeat=length)), dtype=torch.int64).view(
        vocabulary**length, length
    )


def make_world(seed: int = 0, vocabulary: int = 4, length: int = 5, spread: float = 1.0) -> World:
    """A random transformer as π, and r*(y) = Σ_i u(y_{1:i}) with independent normal u: every token matters, and what it
    is worth depends on all tokens before it.

    Args:
        seed: of everything. vocabulary: V. length: n. spread: standard deviation of each u.
    """
    numbers = np.random.default_rng(seed)
    model = LlamaForCausalLM(_config(vocabulary)).double().eval()
    randomise(model, numbers, 0.3)
    model.generation_config.eos_token_id = None
    conditionals, base = [], torch.ones(1, dtype=torch.float64)
    for i in range(length):
        prefixes = answers_of(vocabulary, i)
        texts = torch.cat((torch.full((len(prefixes), 1), PROMPT), prefixes), 1)
        with torch.inference_mode():
            conditionals.append(model(texts, use_cache=False).logits[:, -1].softmax(-1))
        base = (base.unsqueeze(-1) * conditionals[-1]).flatten()
    reward = torch.zeros(1, dtype=torch.float64)
    for i in range(1, length + 1):
        worth = torch.from_numpy(numbers.normal(0, spread, vocabulary**i))
        reward = reward.repeat_interleave(vocabulary) + worth
    reward = reward - base @ reward
    wins = torch.outer(base, base) * torch.sigmoid(reward.unsqueeze(-1) - reward)
    return World(model, vocabulary, length, conditionals, base, reward, wins)


def _config(vocabulary: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )


def randomise(model: PreTrainedModel, numbers: np.random.Generator, scale: float) -> None:
    """Fills a model's matrices with normal numbers that no version of a library changes, and its norms with ones."""
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            drawn = (
                numbers.normal(0, scale, tuple(weight.shape)) if weight.ndim > 1 else np.ones(weight.shape)
            )
            weight.copy_(torch.from_numpy(drawn))


def prefix_wins(wins: Tensor, vocabulary: int, length: int) -> Tensor:
    """The same preferences, as a function of the first `length` tokens of both answers, `[V^length, V^length]`."""
    prefixes = vocabulary**length
    return wins.view(prefixes, -1, prefixes, wins.shape[1] // prefixes).sum((1, 3))


def bradley_terry(wins: Tensor) -> Tensor:
    """The table r that minimises −Σ_ab wins[a, b] log σ(r_a − r_b), by Newton's method; unique up to a constant.

    Args:
        wins: `[A, A]`, positive: how often a is preferred to b.

    Returns:
        `[A]`, with mean 0.
    """
    rewards = torch.zeros(len(wins), dtype=wins.dtype)
    met = wins + wins.T
    for _ in range(100):
        chance = torch.sigmoid(rewards.unsqueeze(-1) - rewards)
        gradient = (met * chance - wins).sum(-1)
        slopes = met * chance * (1 - chance)
        # Rare answers have tiny rows: scaled to a diagonal of ones, the system is solved to the last digits.
        scale = slopes.sum(-1).rsqrt()
        hessian = torch.eye(len(wins), dtype=wins.dtype) - slopes * torch.outer(scale, scale)
        # A constant changes nothing: its direction, the only one without curvature, is taken out of the way.
        constant = (1 / scale) / (1 / scale).norm()
        hessian = hessian + torch.outer(constant, constant)
        step = scale * torch.linalg.solve(hessian, scale * gradient)
        # Newton's step, shortened while it is far from the minimum.
        rewards = rewards - step / max(1.0, float(step.abs().max()))
        if step.abs().max() < 1e-12:
            break
    return rewards - rewards.mean()


def full_bt(world: World, prefixes: Tables) -> Tables:
    """A reward model that minimises the full-sequence Bradley-Terry loss: r* on whole answers, anything on prefixes.

    Args:
        prefixes: tables 0 … n−1, which that loss does not see.
    """
    return [*prefixes[: world.length], world.whole]


def partial_bt(world: World) -> Tables:
    """The reward model that minimises the partial-sequence Bradley-Terry loss (arXiv 2406.07780)."""
    shorter = (prefix_wins(world.wins, world.vocabulary, i) for i in range(world.length))
    return [*(bradley_terry(wins) for wins in shorter), world.whole]


def arbitrary(world: World, seed: int, scale: float = 1.0) -> Tables:
    """Normal numbers for every prefix."""
    numbers = np.random.default_rng(seed)
    return [torch.from_numpy(numbers.normal(0, scale, world.vocabulary**i)) for i in range(world.length + 1)]


def expected_rewards(world: World, reward: Tensor | None = None) -> Tables:
    """E[r* | x, y_{1:i}] of every prefix when π goes on from it: what regression (CD-FUDGE) learns."""
    values = world.reward if reward is None else reward
    tables = [values]
    for conditional in reversed(world.conditionals):
        values = (conditional * values.view(conditional.shape)).sum(-1)
        tables.append(values)
    return tables[::-1]


def soft_values(world: World, beta: float) -> Tables:
    """(1/β) log E[e^{β r*} | x, y_{1:i}]: guided by these, decoding samples from π e^{β r*} itself."""
    return [table.log() / beta for table in expected_rewards(world, (beta * world.reward).exp())]


def realising(world: World, wanted: Tensor, beta: float) -> Tables:
    """Rewards of prefixes under which guided decoding draws all tokens but the last as another policy does.

        r(x, y_{1:i}) = (1/β) log( ρ(y_i | x, y_<i) / π(y_i | x, y_<i) )

    Args:
        wanted: ρ(y | x) of every answer, `[V^n]`, positive.
    """
    tables = [torch.zeros(1, dtype=torch.float64)]
    for i, conditional in enumerate(world.conditionals):
        longer = wanted.view(world.vocabulary ** (i + 1), -1).sum(-1).view(conditional.shape)
        tables.append((longer / longer.sum(-1, keepdim=True) / conditional).log().flatten() / beta)
    return tables


def guided(world: World, rewards: Tables, beta: float) -> Tensor:
    """The probability of every answer, `[V^n]`, when tokens are drawn from π(v) e^{β r(x, y_<i ∘ v)} / Z."""
    policy = torch.ones(1, dtype=torch.float64)
    for conditional, reward in zip(world.conditionals, rewards[1:], strict=True):
        step = (conditional.log() + beta * reward.view(conditional.shape)).softmax(-1)
        policy = (policy.unsqueeze(-1) * step).flatten()
    return policy


def rlhf(world: World, beta: float, rewards: Tensor | None = None) -> Tensor:
    """π(y) e^{β r(y)} / Z, `[V^n]`: no policy as near to π has a higher reward."""
    return (world.base.log() + beta * (world.reward if rewards is None else rewards)).softmax(0)


def rlhf_at(world: World, rewards: Tables, beta: float, length: int) -> Tensor:
    """The same over the prefixes of one length, under their own rewards, `[V^length]`."""
    base = world.base.view(world.vocabulary**length, -1).sum(-1)
    return (base.log() + beta * rewards[length]).softmax(0)


def best_of(world: World, n: int) -> Tensor:
    """The probability that an answer is the best of n draws from π by r*, `[V^n]`; no two rewards are equal."""
    order = world.reward.argsort()
    below = world.base[order].cumsum(0)
    policy = torch.empty_like(world.base)
    policy[order] = below**n - torch.cat((below.new_zeros(1), below[:-1])) ** n
    return policy


def kl(policy: Tensor, base: Tensor) -> float:
    """KL(policy ‖ base) in nats."""
    return float(torch.xlogy(policy, policy / base).sum())


def at_divergence(world: World, policy: Callable[[float], Tensor], nats: float) -> float:
    """E[r*] of a family of policies at the β where it is so many nats from π, by bisection; NaN where it never is."""
    low, high = 0.0, 64.0
    if kl(policy(high), world.base) < nats:
        return math.nan
    for _ in range(60):
        middle = (low + high) / 2
        if kl(policy(middle), world.base) < nats:
            low = middle
        else:
            high = middle
    return float(policy(high) @ world.reward)


def accuracy(world: World, rewards: Tables) -> list[float]:
    """How often a reward model prefers the answer that was preferred, both cut to i tokens, i = 1 … n.

    Pairs that agree in the first i tokens are left out: nothing could tell them apart.
    """
    shares = []
    for i in range(1, world.length + 1):
        wins = prefix_wins(world.wins, world.vocabulary, i)
        higher = rewards[i].unsqueeze(-1) > rewards[i]
        equal = (rewards[i].unsqueeze(-1) == rewards[i]) & ~torch.eye(len(wins), dtype=torch.bool)
        right = wins[higher].sum() + wins[equal].sum() / 2
        shares.append(float(right / (wins.sum() - wins.diag().sum())))
    return shares


def ceiling(world: World) -> list[float]:
    """The most that `accuracy` can be for anything that sees i tokens of both answers, i = 1 … n."""
    shares = []
    for i in range(1, world.length + 1):
        wins = prefix_wins(world.wins, world.vocabulary, i)
        best = torch.maximum(wins, wins.T)
        # Each two prefixes stand twice in `best`.
        shares.append(float((best.sum() - best.diag().sum()) / (wins.sum() - wins.diag().sum()) / 2))
    return shares


def table_reward(world: World, rewards: Tables) -> FunctionReward:
    """A reward for the decoder that looks rewards up in tables."""

    def look_up(prefix_ids: list[Tensor], candidates: Tensor) -> Tensor:
        found = []
        for ids, tokens in zip(prefix_ids, candidates, strict=True):
            before = 0
            for token in ids[1:].tolist():  # the prompt is one token
                before = before * world.vocabulary + token
            found.append(rewards[len(ids)][before * world.vocabulary + tokens])
        return torch.stack(found)

    return FunctionReward(look_up)


def draw(world: World, rewards: Tables, beta: float, count: int) -> Tensor:
    """Answers that `RewardGuidedDecoder` draws with seeds 0 … count − 1, as places among all answers, `[count]`."""
    decoder = RewardGuidedDecoder.from_pretrained(
        (world.model, None), reward=table_reward(world, rewards), engine="transformers", max_batch=256
    )
    result = decoder.generate(
        [[PROMPT]] * count, world.length, Guidance(world.vocabulary, beta), seed=list(range(count))
    )
    digits = torch.tensor([row.tokens for row in result])
    return digits @ world.vocabulary ** torch.arange(world.length - 1, -1, -1)


def chi_square(seen: Tensor, policy: Tensor) -> float:
    """Pearson's test of drawn answers against a policy, answers expected fewer than 5 times pooled: p.

    Args:
        seen: places of the drawn answers, `[count]`. policy: `[V^n]`.
    """
    expected = policy * len(seen)
    counts = torch.bincount(seen, minlength=len(policy)).double()
    rare = expected < 5
    if rare.any():
        expected = torch.cat((expected[~rare], expected[rare].sum().unsqueeze(0)))
        counts = torch.cat((counts[~rare], counts[rare].sum().unsqueeze(0)))
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def train_network(
    world: World, objective: str, seed: int, pairs: int = 4096, steps: int = 400, batch: int = 256
) -> Tables:
    """Trains a small transformer by one of this package's objectives on sampled pairs: its reward of every prefix.

    Args:
        objective: "partial_bt" or "full_bt". seed: of the pairs, the weights and the batches.
        pairs: preferences to learn from. steps, batch: of the optimizer, and pairs in each.
    """
    numbers = np.random.default_rng([seed, 1])
    size = len(world.base)
    drawn = numbers.choice(size, (pairs, 2), p=world.base.numpy())
    first_wins = (
        numbers.random(pairs) < torch.sigmoid(world.reward[drawn[:, 0]] - world.reward[drawn[:, 1]]).numpy()
    )
    drawn = torch.from_numpy(np.where(first_wins[:, None], drawn, drawn[:, ::-1]).copy())
    model = LlamaForSequenceClassification(_config(world.vocabulary, num_labels=1))
    randomise(model, numbers, 0.1)
    answers = world.answers
    texts = torch.cat((torch.full((size, 1), PROMPT), answers), 1)
    offsets = torch.arange(0, 2 * batch * world.length + 1, world.length)
    term = Objective(objective, mode="truncate")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = drawn[numbers.choice(pairs, batch, replace=False)].flatten()
        loss = term.loss(_rewards(model, texts[rows]).flatten(), offsets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        rewards = _rewards(model, texts).double()  # [V^n, n]
    tables = [torch.zeros(1, dtype=torch.float64)]
    for i in range(1, world.length + 1):
        # A causal model gives every answer with the same first i tokens the same reward there.
        tables.append(rewards[:: size // world.vocabulary**i, i - 1].clone())
    return tables


def _rewards(model: LlamaForSequenceClassification, texts: Tensor) -> Tensor:
    """The reward of every prefix of every answer, `[N, n]`."""
    hidden = model.model(input_ids=texts, use_cache=False).last_hidden_state
    return model.score(hidden).squeeze(-1)[:, 1:]
