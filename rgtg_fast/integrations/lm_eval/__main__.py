"""The command line of lm-evaluation-harness with the model `rgtg` registered."""

import sys

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

from rgtg_fast.errors import RGTGError


def main() -> None:
    """Runs the harness; an error that the user can fix is one line."""
    try:
        cli_evaluate()  # pyright: ignore[reportCallIssue]
    except RGTGError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
