"""Benchmarks: every number and figure of the documentation is made here."""
