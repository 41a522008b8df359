"""What the documents say exists, and their code is code."""

import ast
import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

import rgtg_fast
from rgtg_fast.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PACKAGE = ROOT / "rgtg_fast"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def defined_by(module: str) -> set[str]:
    """The functions and classes that a module's file defines, found without importing it."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def check_names(source: str) -> None:
    """Every name that is imported from the package is there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rgtg_fast":
            try:
                module = importlib.import_module(node.module or "")
            except ModuleNotFoundError as error:
                # Another program's plug-in, where that program is not installed: its own text names what it holds.
                if error.name not in OPTIONAL or not {alias.name for alias in node.names} <= defined_by(
                    node.module or ""
                ):
                    raise
                continue
            for alias in node.names:
                assert getattr(module, alias.name) is not None


def anchors(page: Path) -> set[str]:
    """The fragments that lead to the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing
    for target, fragment in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        assert fragment in anchors(page.parent / target if target else page), f"{target}#{fragment}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        check_names(block)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_import_what_exists(example: Path) -> None:
    check_names(example.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_examples_in_docstrings_run(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for line in "".join(blocks(page, "sh")).splitlines():
        for name, rest in re.findall(r"rgtg-fast ([\w-]+)([^|&]*)", line):
            assert name in commands, line
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, line


def test_every_command_has_a_section() -> None:
    sections = re.findall(r"^## (\S+)$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert not set(commands) - set(sections)


def test_readme_starts_with_the_two_commands() -> None:
    lines = "".join(blocks(PAGES[0], "sh")).splitlines()
    assert lines[0].startswith("pip install")
    assert lines[0].endswith("rgtg-fast demo")
    assert lines[1].startswith("pip install")
    assert lines[1].endswith("python -m pytest -n 2")
    assert all("-c constraints.txt -e " in line for line in lines[:2]), (
        "what was tested, and kernels in the tree"
    )


COMMANDS = [line for line in "".join(blocks(PAGES[0], "sh")).splitlines() if line.startswith("rgtg-fast ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_readme_are_taken_as_they_stand(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arguments are parsed, and every file is in the repository or written by a command before."""
    monkeypatch.chdir(ROOT)
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    values = command.make_context(name, arguments).params
    before = " ".join(COMMANDS[: COMMANDS.index(line)])
    for option in ("input", "data", "config", "reward"):
        given = values.get(option) or ()
        for value in [given] if isinstance(given, (str, Path)) else given:
            path = str(value)
            assert (ROOT / path).exists() or f"--output {path}" in before or path.startswith("bundled:"), line


def requirements(*extras: str) -> dict[str, Requirement]:
    """What the package asks for by itself and with extras, those that an extra names included."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML: extras are NOT checked")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Requirement] = {}
    waiting = list(project["dependencies"])
    for extra in extras:
        waiting += project["optional-dependencies"][extra]
    while waiting:
        asked = Requirement(waiting.pop())
        if asked.name == project["name"]:
            waiting += [line for extra in asked.extras for line in project["optional-dependencies"][extra]]
        else:
            found[asked.name.lower()] = asked
    return found


# What the package imports where it is there, and no command of the README needs: other tools' plug-ins, the trainers of
# `rgtg-fast train-policy`, and what other packages bring.
OPTIONAL = {"vllm", "ray", "lm_eval", "liger_kernel", "triton", "trl"}
BROUGHT = {
    "pyarrow": "datasets",
    "huggingface_hub": "transformers",
    "filelock": "torch",
    "tokenizers": "transformers",
    "tqdm": "transformers",
}
PROJECTS = {"yaml": "pyyaml", "rouge_score": "rouge-score"}


def test_the_readmes_first_command_installs_what_its_commands_import() -> None:
    imported = set()
    for path in (ROOT / "rgtg_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= OPTIONAL | set(sys.stdlib_module_names) | {"rgtg_fast"}
    wanted = {PROJECTS.get(name, BROUGHT.get(name, name)) for name in imported}
    assert {"peft", "datasets", "matplotlib", "torch"} <= wanted
    assert wanted <= set(requirements("demo"))


def test_the_tested_versions_are_allowed_and_complete() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {asked.name.lower(): asked for asked in found}
    wanted = requirements("demo", "test")
    assert wanted.keys() - pinned.keys() == {"triton"}
    for name, asked in pinned.items():
        (version,) = asked.specifier
        assert version.operator == "=="
        assert name not in wanted or wanted[name].specifier.contains(version.version), name


def test_entry_points_name_what_exists() -> None:
    """Those of other programs too, which are not installed here."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML: entry points are NOT checked")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = {**project["scripts"], **project["entry-points"]["lm_eval.models"]}
    assert points.keys() == {"rgtg-fast", "rgtg"}
    for target in points.values():
        module, _, name = target.partition(":")
        assert name in defined_by(module), target


def test_readme_has_a_place_for_the_benchmarks() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.index("<!-- shared-trunk:begin -->") < text.index("<!-- shared-trunk:end -->")


def test_the_architecture_page_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE))
    missing = sorted(name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists())
    assert not missing, "docs/architecture.md names what is not there"
    folders = {name for name in named if name.endswith("/")} | {"cli/", "ops/"}
    modules = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    # An old import path that is kept for one release says so in its first line.
    modules = [path for path in modules if not path.read_text(encoding="utf-8").startswith('"""Deprecated')]
    names = {str(path.relative_to(PACKAGE)) for path in modules} - named
    unnamed = sorted(name for name in names if not any(name.startswith(folder) for folder in folders))
    assert not unnamed, "docs/architecture.md does not name these"


def test_files_for_the_repository_host_are_valid() -> None:
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rgtg_fast.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
