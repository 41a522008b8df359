"""Kept for one release for `rgtg_fast.app.embedded`."""
