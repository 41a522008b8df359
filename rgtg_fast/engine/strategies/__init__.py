"""Other ways to use the same two models: best-of-n, segment-level rejection sampling, blockwise best-of-k."""

from rgtg_fast.engine.strategies.run import check_strategy, named_strategy, run_strategy

__all__ = ["check_strategy", "named_strategy", "run_strategy"]
