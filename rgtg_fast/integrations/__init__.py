"""Reward-guided decoding in other libraries: one module for each, which imports that library."""
