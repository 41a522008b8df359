"""The old place of `default_model`, for one release; see `rgtg_fast.app.embedded`."""
