"""Import from `rgtg_fast.models.device`."""

from rgtg_fast.models.device import without_autocast as without_autocast
