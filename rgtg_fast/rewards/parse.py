"""Rewards by name: `farma:PATH`, `genarm:PATH`, `mixture:0.7*pargs:PATH+0.3*contrastive` ..."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.loading import ModelAndTokenizer
from rgtg_fast.models.quantized import check_weights
from rgtg_fast.rewards.base import Reward
from rgtg_fast.rewards.contrastive import ContrastiveReward
from rgtg_fast.rewards.function import FunctionReward
from rgtg_fast.rewards.mixture import MixtureReward
from rgtg_fast.rewards.sequence import RADReward, SequenceReward
from rgtg_fast.rewards.text import TextReward
from rgtg_fast.rewards.vocabulary import (
    AutoregressiveReward,
    LogRatioReward,
    VocabularyReward,
    VocabularyScorer,
)

CONTRASTIVE = "contrastive"
RewardLike = Reward | str | os.PathLike[str] | ModelAndTokenizer | Callable[..., Any] | None
_TERM = re.compile(r"\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*\*\s*(.+?)\s*", re.DOTALL)


def _log_ratio(paths: str) -> Reward:
    tuned, _, untuned = (part.strip() for part in paths.partition(","))
    if not tuned or not untuned:
        raise RGTGError(f"'eft:{paths}' names one model and needs two: use eft:TUNED,UNTUNED")
    return LogRatioReward(tuned, untuned)


def _mixture(terms: str) -> Reward:
    rewards, weights = [], []
    # A plus sign begins a term only where a weight and an asterisk follow: paths may contain it.
    for term in re.split(r"\+(?=\s*[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?\s*\*)", terms):
        match = _TERM.fullmatch(term)
        if match is None:
            raise RGTGError(
                f"{term!r} is not a term of a mixture: use mixture:0.7*pargs:PATH+0.3*contrastive, a weight for each"
            )
        weights.append(float(match[1]))
        rewards.append(named_guide(match[2]))
    return MixtureReward(rewards, weights)


# The word before the colon, and what makes a reward of the rest.
PREFIXES: dict[str, Callable[[str], Reward]] = {
    "pargs": SequenceReward,
    "args": SequenceReward,
    "cd-fudge": SequenceReward,
    "rad": RADReward,
    "rad-inverse": lambda path: RADReward(path, invert=True),
    "farma": VocabularyReward,
    "genarm": AutoregressiveReward,
    "eft": _log_ratio,
    "text": TextReward,
    "mixture": _mixture,
}


def named_guide(
    name: str,
    label: str | int | None = None,
    trust_remote_code: bool = False,
    weights: str | None = None,
) -> Reward:
    """The reward that a name on the command line or in `from_pretrained(reward=...)` means.

    Args:
        name: `contrastive`; a method's prefix, a colon and what it needs (`farma:PATH`, `eft:TUNED,UNTUNED`,
            `mixture:0.7*pargs:PATH+0.3*contrastive`); or a path or hub id alone, a `SequenceReward`.
        label: as in `SequenceReward` and `TextReward`.
        trust_remote_code: whether code that comes with the models named may run; never that of an adapter's base.
        weights: as in `SequenceReward`, for every model named.

    Raises:
        RGTGError: weights to round or a label for another reward, nothing behind the colon, or a mixture or pair that
            cannot be read.

    Example:
        >>> type(named_guide("farma:some/folder")).__name__
        'VocabularyReward'
        >>> named_guide("mixture: 0.7*pargs:a + 0.3*contrastive").weights
        (0.7, 0.3)
    """
    check_weights(weights)
    if label is not None or trust_remote_code or weights is not None:
        reward = named_guide(name)
        if label is not None:
            if not isinstance(reward, (SequenceReward, TextReward)):
                way_out = "leave it out"
                if isinstance(reward, MixtureReward):
                    way_out += ", or give it to a part in Python: MixtureReward([SequenceReward(..., label=...), ...])"
                raise RGTGError(
                    f"label={label!r} chooses a label of one reward model and {name!r} is a {type(reward).__name__}: "
                    f"{way_out}"
                )
            reward.label = label
        for each in reward.rewards if isinstance(reward, MixtureReward) else [reward]:
            if isinstance(each, (SequenceReward, TextReward, VocabularyScorer)):
                each.trust_remote_code = trust_remote_code
            if weights is not None:
                if not isinstance(each, (SequenceReward, VocabularyScorer)):
                    raise RGTGError(
                        f"weights={weights!r} rounds a reward model over the base model's tokens and {name!r} needs a "
                        f"{type(each).__name__}: leave it out"
                    )
                each.weights = weights
        return reward
    if name == CONTRASTIVE:
        return ContrastiveReward()
    prefix, colon, rest = name.partition(":")
    if not colon or prefix not in PREFIXES:
        return SequenceReward(name)
    if not rest.strip():
        raise RGTGError(f"reward {name!r} names no model: put a path or hub id after the colon")
    return PREFIXES[prefix](rest.strip())


def as_reward(
    reward: RewardLike, label: str | int | None, trust_remote_code: bool, weights: str | None
) -> Reward | None:
    """The reward that `RewardGuidedDecoder.from_pretrained(reward=...)` means; arguments as there.

    Args:
        weights: its `reward_weights`.

    Raises:
        RGTGError: something else, or a label or weights that belong to another kind of reward.
    """
    check_weights(weights, "reward_weights")
    if isinstance(reward, str):
        return named_guide(reward, label, trust_remote_code, weights)
    if isinstance(reward, (os.PathLike, tuple, list)):
        source: Any = reward
        return SequenceReward(source, label=label, trust_remote_code=trust_remote_code, weights=weights)
    if weights is not None:
        raise RGTGError(
            f"reward_weights={weights!r} and reward={shown(reward)}: it belongs to the path or hub id of a reward "
            f"model; a reward has weights of its own, as SequenceReward(..., weights={weights!r})"
        )
    if label is not None:
        raise RGTGError(
            f"label={label!r} and reward={shown(reward)}: a label belongs to the path or pair of a reward model, or to "
            "SequenceReward(..., label=...)"
        )
    if reward is None or isinstance(reward, Reward):
        return reward
    return FunctionReward(reward)
