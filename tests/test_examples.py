"""The examples run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_lm, make_rm, make_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
TESTS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_a_test_runs_it_or_it_says_why_none_does(example: Path) -> None:
    """A file that no test names and whose first lines do not say "No test runs it" is what this finds."""
    named = [str(path.relative_to(ROOT)) for path, text in TESTS.items() if example.name in text]
    assert named or "No test runs it" in example.read_text(encoding="utf-8")[:2000], (
        f"add {example.name} to a test, such as those of {__file__}"
    )


def run(example: str, *arguments: str) -> list[str]:
    """The lines that an example prints, started as a user would from the repository's folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error::FutureWarning",
    }
    command = [sys.executable, f"examples/{example}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.usefixtures("smollm2")
def test_contrastive() -> None:
    lines = run("contrastive.py", "What is a good name for a cat?")
    assert len([line for line in lines if line.startswith(("friendly, ", "practical, "))]) == 4


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.usefixtures("smollm2")
def test_own_reward() -> None:
    answer = "\n".join(run("own_reward.py"))
    assert len(answer.split()) > 10
    assert answer.lower().count("e") < 0.03 * len(answer), "every tenth letter of English is an e"


@pytest.mark.slow
def test_reward_model(tmp_path: Path) -> None:
    for name, model in {"lm": make_lm(), "rm": make_rm()}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    lines = run("reward_model.py", str(tmp_path / "lm"), str(tmp_path / "rm"))
    assert sorted(line.partition(":")[0] for line in lines) == [
        f"beta={beta}" for beta in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
