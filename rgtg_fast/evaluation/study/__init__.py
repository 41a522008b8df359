"""A study: methods side by side on held-out prompts, judged by a reward model that none of the methods uses."""

from typing import Any

from rgtg_fast.deprecation import warn_renamed


def __getattr__(name: str) -> Any:
    if name != "run_study":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rgtg_fast.evaluation.study.run import run_study

    warn_renamed(f"{__name__}.{name}", f"{__name__}.run.{name}")
    return run_study
