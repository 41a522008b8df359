"""Models that come with the package: the embedded language model, and reward models that are adapters of it.

from rgtg_fast.bundled import default_model

decoder = RewardGuidedDecoder.from_pretrained(default_model(), reward="bundled:pargs")
"""

from __future__ import annotations

from pathlib import Path

from rgtg_fast.bundled.embedded import default_model as default_model
from rgtg_fast.errors import RGTGError

PREFIX = "bundled:"
FOLDER = Path(__file__).parent
BELONGS = "the bundled reward models are adapters of SmolLM2-135M-Instruct, the default language model"


def names() -> list[str]:
    """Names of the bundled reward models: `bundled:args`, `bundled:pargs`."""
    return sorted(PREFIX + path.parent.name for path in FOLDER.glob("*/adapter_config.json"))


def resolve(source: str) -> str:
    """The folder of a bundled reward model; any other name is returned unchanged.

    Args:
        source: a path, a hub id or `bundled:NAME`.

    Raises:
        RGTGError: there is no bundled reward model of this name.

    Example:
        >>> resolve("some/path")
        'some/path'
    """
    if not source.startswith(PREFIX):
        return source
    if source not in names():
        raise RGTGError(f"{source!r} is not a bundled reward model: use one of {', '.join(names())}")
    return str(FOLDER / source.removeprefix(PREFIX))


def name_of(folder: str) -> str | None:
    """The name of a bundled reward model by its folder, None for any other folder.

    Example:
        >>> name_of(resolve("bundled:pargs"))
        'bundled:pargs'
    """
    path = Path(folder)
    return PREFIX + path.name if path.parent == FOLDER else None
