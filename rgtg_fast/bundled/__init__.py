"""The guides that come with the package: small adapters of the embedded language model, named `bundled:NAME`."""

from __future__ import annotations

from pathlib import Path

from rgtg_fast.bundled.embedded import default_model as default_model
from rgtg_fast.errors import RGTGError

PREFIX = "bundled:"
FOLDER = Path(__file__).parent
BELONGS = "the bundled guides are adapters of SmolLM2-135M-Instruct, the default language model"


def names() -> list[str]:
    """The guides that are there, as they are named: `bundled:args`, `bundled:pargs`."""
    return sorted(PREFIX + path.parent.name for path in FOLDER.glob("*/adapter_config.json"))


def resolve(source: str) -> str:
    """The folder of a bundled guide; any other name as it is.

    Args:
        source: a path, a hub id or `bundled:NAME`.

    Raises:
        RGTGError: no such guide comes with the package.

    Example:
        >>> resolve("some/path")
        'some/path'
    """
    if not source.startswith(PREFIX):
        return source
    if source not in names():
        raise RGTGError(f"{source!r} is no bundled guide: use one of {', '.join(names())}")
    return str(FOLDER / source.removeprefix(PREFIX))


def name_of(folder: str) -> str | None:
    """The name of a bundled guide by its folder, None for any other folder.

    Example:
        >>> name_of(resolve("bundled:pargs"))
        'bundled:pargs'
    """
    path = Path(folder)
    return PREFIX + path.name if path.parent == FOLDER else None
