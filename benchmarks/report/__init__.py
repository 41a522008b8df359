"""Every table and figure of README and docs, made from the results of the benchmarks: `python -m benchmarks.report`."""
