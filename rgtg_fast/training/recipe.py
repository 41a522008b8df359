"""Deprecated import path of `train_reward_model` and `TrainConfig`; it will be removed in the next release."""

from rgtg_fast.deprecation import warn_renamed
from rgtg_fast.training.config import TrainConfig as Recipe
from rgtg_fast.training.launch import train_reward_model

__all__ = ["Recipe", "train_reward_model"]

warn_renamed("rgtg_fast.training.recipe.Recipe", "rgtg_fast.training.config.TrainConfig")
warn_renamed("rgtg_fast.training.recipe.train_reward_model", "rgtg_fast.training.launch.train_reward_model")
