"""Deprecated; holds the old import path of `default_model`."""
