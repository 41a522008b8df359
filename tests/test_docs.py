"""What the documents say exists, and their code is code."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

import rgtg_fast
from rgtg_fast.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def check_names(source: str) -> None:
    """Every name that is imported from the package is there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "rgtg_fast":
            for alias in node.names:
                assert getattr(rgtg_fast, alias.name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        check_names(block)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_import_what_exists(example: Path) -> None:
    check_names(example.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for line in "".join(blocks(page, "sh")).splitlines():
        for name, rest in re.findall(r"rgtg-fast ([\w-]+)([^|&]*)", line):
            assert name in commands, line
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, line


def test_readme_starts_with_the_two_commands() -> None:
    lines = "".join(blocks(PAGES[0], "sh")).splitlines()
    assert lines[0].startswith("pip install")
    assert lines[0].endswith("rgtg-fast demo")
    assert lines[1].startswith("pip install")
    assert lines[1].endswith("python -m pytest")


def test_readme_has_a_place_for_the_benchmarks() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.index("<!-- benchmarks:begin -->") < text.index("<!-- benchmarks:end -->")
