"""Guides: what the decoder asks for the reward of a candidate."""

from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.contrastive import ContrastiveReward
from rgtg_fast.rewards.function import FunctionReward
from rgtg_fast.rewards.sequence import SequenceReward
from rgtg_fast.rewards.text import TextReward

__all__ = ["ContrastiveReward", "FunctionReward", "Prefix", "Reward", "SequenceReward", "TextReward"]
