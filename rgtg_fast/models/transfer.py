"""Import from `rgtg_fast.models.device`."""

from rgtg_fast.models.device import AsyncCopy as AsyncCopy
from rgtg_fast.models.device import to_device as to_device
