"""`default_model` under its former name, for one release."""

import warnings

from rgtg_fast.bundled import default_model as default_model

warnings.warn(
    "rgtg_fast.app.embedded is now rgtg_fast.bundled: use `from rgtg_fast.bundled import default_model`",
    DeprecationWarning,
    stacklevel=2,
)
