"""Other ways to spend the same two models: best-of-n, segment-level rejection, blockwise best-of-k."""

from rgtg_fast.decoding.strategies.ends import Ends
from rgtg_fast.decoding.strategies.run import Call, check_strategy, named_strategy, run_strategy

__all__ = ["Call", "Ends", "check_strategy", "named_strategy", "run_strategy"]
