"""Import from `rgtg_fast.models.device`."""

from rgtg_fast.models.device import free_bytes as free_bytes
