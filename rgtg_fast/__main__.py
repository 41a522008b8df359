"""`python -m rgtg_fast` is `rgtg-fast`."""

from rgtg_fast.cli.main import main

main()
