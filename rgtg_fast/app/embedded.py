"""The old place of `rgtg_fast.bundled.embedded`, for one release."""

import warnings

from rgtg_fast.bundled.embedded import default_model as default_model

warnings.warn(
    "rgtg_fast.app.embedded is now rgtg_fast.bundled.embedded: import default_model from there",
    DeprecationWarning,
    stacklevel=2,
)
