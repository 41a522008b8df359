"""`rgtg-fast train-policy` and `rgtg-fast token-rewards`."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.cli.conftest import Run, byte_tokenizer

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "preferences.jsonl"
TEMPLATES = "better: 'Q {question} A {answer} Better.'\nworse: 'Q {question} A {answer} Worse.'\n"


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """Short enough for the tiny model's context."""
    path = tmp_path / "templates.yaml"
    path.write_text(TEMPLATES)
    return path


def settings(lm: str, tmp_path: Path) -> list[object]:
    return [
        "train-policy", "--model", lm, "--data", EXAMPLE, "--output", tmp_path / "policy", "--limit", 12,
        "--max-length", 250, "--batch", 2, "--accumulate", 2, "--token-cache", tmp_path / "tokens", "--device", "cpu",
        "--log-steps", 1,
    ]  # fmt: skip


def test_a_policy_from_the_command_line(run: Run, lm: str, rm: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="policies are trained by trl")
    arguments = [*settings(lm, tmp_path), "--fork-layer", 1, "--held-out", 0.3, "--lr", 0.001]
    outcome = run(*arguments, "--objective", "dpo", "--json")
    assert outcome.code == 0, outcome.err
    (report,) = outcome.rows
    assert report["steps"] > 0
    assert report["recipe"]["objective"] == "dpo"
    assert 0 <= report["metrics"]["accuracy"] <= 1
    assert "pairs/s" in outcome.err
    assert list((tmp_path / "tokens").glob("reference-*.f32"))
    for reward in ("none", rm):
        answer = run(
            "generate",
            "Hello",
            "--lm",
            tmp_path / "policy",
            "--reward",
            reward,
            "--max-new-tokens",
            2,
            "--json",
        )
        assert answer.code == 0, answer.err
    assert "is not empty" in run(*arguments).error


def test_rloo_from_the_command_line(run: Run, lm: str, rm: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="policies are trained by trl")
    arguments = [*settings(lm, tmp_path), "--objective", "rloo", "--reward", rm, "--samples", 2]
    outcome = run(*arguments, "--max-new-tokens", 4, "--limit", 4)
    assert outcome.code == 0, outcome.err
    assert "mean reward" in outcome.out
    assert "reward " in outcome.err


def test_policies_that_cannot_be(run: Run, lm: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="policies are trained by trl")
    arguments = settings(lm, tmp_path)
    assert "objective='ppo': TRL has no PPO trainer" in run(*arguments, "--objective", "ppo").error
    assert "takes no reward" in run(*arguments, "--reward", lm).error
    assert "cannot read the templates" in run(*arguments, "--templates", tmp_path / "none.yaml").error
    assert "tokens in its contrastive template" in run(*arguments, "--objective", "treg").error
    assert "alpha=nan" in run(*arguments, "--alpha", "nan").error


class _Spans(HTMLParser):
    """What the spans of a page say and how they are coloured."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.styles: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "span"
        if self._inside:
            self.styles.append(dict(attrs)["style"] or "")
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def test_token_rewards(run: Run, lm: str, templates: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    answer = "Boil <it> & wait."
    arguments = ["token-rewards", "An egg?", answer, "--lm", lm, "--templates", templates]
    outcome = run(*arguments, "--html", page, "--json")
    assert outcome.code == 0, outcome.err
    (report,) = outcome.rows
    tokenizer = byte_tokenizer()
    expected = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [token["token"] for token in report["tokens"]] == expected
    assert "".join(token["text"] for token in report["tokens"]) == answer + "</s>"
    rewards = [token["reward"] for token in report["tokens"]]
    assert all(-0.5 <= reward <= 0.5 for reward in rewards)
    assert len(set(rewards)) > 5
    assert report["mean_reward"] == pytest.approx(sum(rewards) / len(rewards))

    spans = _Spans()
    text = page.read_text(encoding="utf-8")
    spans.feed(text)
    assert spans.texts == [token["text"] for token in report["tokens"]]
    assert all(
        ("--pick" in style) == (reward > 0) for style, reward in zip(spans.styles, rewards, strict=True)
    )
    assert "http" not in text.replace("http-equiv", "")

    shown = run(*arguments)
    assert shown.code == 0
    assert answer in shown.out
    assert "mean reward" in shown.out
    refused = run("token-rewards", "An egg?", " ", "--lm", lm)
    assert "the answer is empty" in refused.error
    templates.write_text("better: '{question} {answer}'\nworse: '{question}'\n")
    assert "has no {answer}" in run(*arguments).error
