"""Import from `rgtg_fast.models.model_state`."""

from rgtg_fast.models.model_state import InferenceState as Served
from rgtg_fast.models.model_state import ModelSnapshot as Watched

__all__ = ["Served", "Watched"]
