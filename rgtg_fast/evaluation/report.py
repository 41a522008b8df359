"""Deprecated import path of `write_report`; it will be removed in the next release."""

from rgtg_fast.deprecation import warn_renamed
from rgtg_fast.evaluation.study.report import write_report

__all__ = ["write_report"]

warn_renamed("rgtg_fast.evaluation.report", "rgtg_fast.evaluation.study.report")
