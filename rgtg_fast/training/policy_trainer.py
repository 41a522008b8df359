"""Deprecated import path of `TRegTrainer`; it will be removed in the next release."""

from rgtg_fast.deprecation import warn_renamed
from rgtg_fast.training.policy.trainer import TRegTrainer, preference_dataset

__all__ = ["TRegTrainer", "preference_dataset"]

warn_renamed("rgtg_fast.training.policy_trainer", "rgtg_fast.training.policy.trainer")
