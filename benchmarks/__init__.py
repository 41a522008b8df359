"""Benchmarks: sweeps that write results/*.csv, and `report`, which makes the tables and figures of the docs."""
