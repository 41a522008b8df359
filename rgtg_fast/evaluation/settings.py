"""Deprecated import path of `Study`; it will be removed in the next release."""

from rgtg_fast.deprecation import warn_renamed
from rgtg_fast.evaluation.study.settings import Study

__all__ = ["Study"]

warn_renamed("rgtg_fast.evaluation.settings", "rgtg_fast.evaluation.study.settings")
