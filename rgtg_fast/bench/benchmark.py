"""The names of `rgtg_fast.bench` at the path that the command line imports."""

from rgtg_fast.bench.roofline import machine as machine
from rgtg_fast.bench.run import run_bench as run_bench
