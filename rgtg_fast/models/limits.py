"""Import from `rgtg_fast.models.support`."""

from rgtg_fast.models.support import STATIC_ROPE as STATIC_ROPE
