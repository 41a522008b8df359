"""Other ways to spend the same two models: best-of-n, segment-level rejection, blockwise best-of-k."""

from rgtg_fast.engine.strategies.run import Call, check_strategy, named_strategy, run_strategy
from rgtg_fast.engine.strategies.stopping import StoppingCriteria

__all__ = ["Call", "StoppingCriteria", "check_strategy", "named_strategy", "run_strategy"]
