"""Training a policy itself: DPO, SimPO, T-REG and RLOO on the trainers of TRL."""

from __future__ import annotations

import importlib
from typing import Any

from rgtg_fast.deprecation import warn_renamed

# Old name -> its module and new name.
_RENAMED = {"PolicyRecipe": ("config", "PolicyTrainConfig"), "train_policy": ("launch", "train_policy")}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, new = _RENAMED[name]
    warn_renamed(f"{__name__}.{name}", f"{__name__}.{module}.{new}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), new)
