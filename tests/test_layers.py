"""Imports go one way through the package, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rgtg_fast"

# What a layer may import of ours, besides itself.
BASE = {"config", "deprecation", "errors", "files", "plaintext", "processes", "profiling"}
OPS = BASE | {"ops", "_C"}
MODELS = OPS | {"bundled", "models"}
REWARDS = MODELS | {"rewards"}
ENGINE = REWARDS | {"engine"}
DECODER = ENGINE | {"decoder", "scorer"}
TRAINING = MODELS | {"training"}
INTEGRATIONS = DECODER | {"integrations"}
EVALUATION = DECODER | {"bench", "evaluation", "methods", "training"}
ALLOWED = {
    "config": {"deprecation", "errors"},
    "deprecation": {"errors"},
    "errors": set(),
    "files": {"errors"},
    "methods": set(),
    "plaintext": set(),
    "processes": {"errors"},
    "profiling": {"config", "errors"},
    "app": {"bundled", "deprecation"},
    "bundled": {"errors", "files"},
    "ops": OPS,
    "models": MODELS,
    "rewards": REWARDS,
    "engine": ENGINE,
    "decoder": DECODER,
    "training": TRAINING,
    "scorer": ENGINE | {"scorer"},
    "integrations": INTEGRATIONS,
    "bench": EVALUATION,
    "evaluation": EVALUATION,
    "cli": EVALUATION | {"cli", "integrations"},
    "__main__": {"cli"},
    "__init__": INTEGRATIONS,
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """Every module of ours that a file imports, in functions and type-checking blocks too, with its line."""
    parts = ("rgtg_fast", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = list(parts[: len(parts) - node.level]) if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            # `from rgtg_fast import ops` names a layer; `from rgtg_fast import Guidance` a public name.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "rgtg_fast"]


def layer_of_name(name: str) -> str:
    """The layer that a dotted name belongs to; a public name counts as the top of the library."""
    parts = name.split(".")
    if len(parts) < 2:
        return "decoder"
    if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file() or parts[1] == "_C":
        return parts[1]
    return "decoder"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ALLOWED, f"{path} is in no layer: add it to ALLOWED"
    allowed = ALLOWED[layer] | {layer}
    wrong = [(line, name) for line, name in imported(path) if layer_of_name(name) not in allowed]
    assert not wrong, f"{path} ({layer}) may import {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.name)
def test_ops_do_not_know_transformers(path: Path) -> None:
    names = [
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert not [name for name in names if name.split(".")[0] == "transformers"]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a statement leaves loaded in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import rgtg_fast",
        "import rgtg_fast.cli.main",
        "import rgtg_fast.training.config, rgtg_fast.training.policy.config",
    ],
)
def test_import_is_light(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "transformers", "numpy"}
