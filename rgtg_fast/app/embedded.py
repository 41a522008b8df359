"""Deprecated import path of `default_model`; it will be removed in the next release."""

from rgtg_fast.bundled import default_model as default_model
from rgtg_fast.deprecation import warn_renamed

warn_renamed("rgtg_fast.app.embedded", "rgtg_fast.bundled")
