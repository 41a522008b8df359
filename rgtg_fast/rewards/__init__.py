"""Rewards: what the decoder asks for the reward of a candidate."""

from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.contrastive import ContrastiveReward
from rgtg_fast.rewards.function import FunctionReward
from rgtg_fast.rewards.mixture import MixtureReward
from rgtg_fast.rewards.parse import named_guide
from rgtg_fast.rewards.sequence import RADReward, SequenceReward
from rgtg_fast.rewards.text import TextReward
from rgtg_fast.rewards.vocabulary import AutoregressiveReward, LogRatioReward, VocabularyReward

__all__ = [
    "AutoregressiveReward",
    "ContrastiveReward",
    "FunctionReward",
    "LogRatioReward",
    "MixtureReward",
    "Prefix",
    "RADReward",
    "Reward",
    "SequenceReward",
    "TextReward",
    "VocabularyReward",
    "named_guide",
]
