"""Reward-guided decoding inside other libraries and servers."""
