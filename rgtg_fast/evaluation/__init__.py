"""Measures decoding: the published algorithms to compare with, and the benchmark that times them."""
