"""`rgtg-fast methods`, its pages, and the guides that `--reward` names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import rgtg_fast
from rgtg_fast import methods
from rgtg_fast.engine.strategies import named_strategy
from rgtg_fast.rewards.parse import CONTRASTIVE, PREFIXES
from tests.cli.conftest import config, save
from tests.cli.support import read_rows

PAGES = Path(__file__).parents[2] / "docs" / "methods"


@pytest.fixture(scope="module")
def vocabulary_rm(models_folder: Path) -> str:
    torch.manual_seed(3)
    return save(LlamaForCausalLM(config(initializer_range=0.3)), models_folder / "vocabulary_rm")


def test_methods(run: Callable) -> None:
    listed = json.loads(run("methods", "--json").out)["methods"]
    assert [row["name"] for row in listed] == [method.name for method in methods.METHODS]
    for row in listed:
        assert getattr(rgtg_fast, row["reward_class"]) is not None
        assert row["formula"]
        assert row["cost"] is None or row["cost"]["lm"]
    text = run("methods").out
    for method in methods.METHODS:
        assert method.name in text
    assert "head(h(x, y_<i))[v]" in text


def test_every_name_is_in_the_table_and_every_usage_is_a_name() -> None:
    usages = [usage.strip() for m in methods.METHODS for usage in (m.usage or "").split(" ") if usage]
    prefixes = {usage.partition(":")[0] for usage in usages if ":" in usage}
    assert prefixes <= set(PREFIXES)
    assert {m.name for m in methods.METHODS} >= {name.removesuffix("-inverse") for name in PREFIXES}
    assert CONTRASTIVE in usages


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_every_method_has_its_page(method: methods.Method) -> None:
    page = (PAGES / f"{method.name}.md").read_text(encoding="utf-8")
    assert method.page == f"docs/methods/{method.name}.md"
    assert "```python" in page
    assert method.usage is None or method.usage.partition(":")[0] in page
    for source in method.source.split(", "):
        assert source.split("of ")[-1].replace("arXiv ", "") in page


def test_the_index_has_the_tables() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert methods.methods_markdown() in index
    assert methods.strategies_markdown() in index


@pytest.mark.parametrize("strategy", methods.STRATEGIES, ids=lambda strategy: strategy.name)
def test_every_strategy_has_its_page_and_its_class(strategy: methods.Strategy) -> None:
    page = (PAGES.parents[1] / strategy.page).read_text(encoding="utf-8")
    assert strategy.source.removeprefix("arXiv ") in page
    assert type(named_strategy(strategy.usage)).__name__ == strategy.strategy_class
    assert getattr(rgtg_fast, strategy.strategy_class) is not None


@pytest.mark.parametrize(
    "strategy", ["best_of_n:n=3", "segment:target=1,max_tokens=5", "blockwise:k=2,length=3"]
)
def test_strategies(
    run: Callable, lm: str, rm: str, strategy: str, prompts_file: Callable, tmp_path: Path
) -> None:
    args = ("--lm", lm, "--reward", rm, "--strategy", strategy, "--max-new-tokens", 6)
    outcome = run("generate", "is tea safe?", *args, "--json", "--temperature", 0.8)
    assert outcome.code == 0, outcome.err
    (row,) = outcome.rows
    assert row["strategy"] == f"{strategy},temperature=0.8"
    assert "beta" not in row
    assert row["stats"]["reward_calls"] > 0
    output = tmp_path / "answers.jsonl"
    many = prompts_file({"prompt": "is tea safe?"}, {"prompt": "why?", "beta": 3}, {"prompt": "how?"})
    outcome = run("generate", "--input", many, *args, "--output", output)
    assert "does not choose token by token" in outcome.error
    assert {row["prompt"] for row in read_rows(output)} == {"is tea safe?", "how?"}
    assert "--strategy" in run("generate", "is tea safe?", *args, "--stream").error


def test_strategies_that_cannot_be(run: Callable, lm: str, rm: str) -> None:
    for name, message in (("best", "is unknown"), ("segment:beta=0", "not above 0")):
        assert message in run("generate", "hello", "--lm", lm, "--reward", rm, "--strategy", name).error
    args = ("--lm", lm, "--reward", "contrastive", "--strategy", "blockwise", "--max-new-tokens", 4)
    assert "share_trunk=False" in run("generate", "hello", *args).error


@pytest.mark.parametrize("support", ["lm", "combined", "all"])
@pytest.mark.parametrize("name", ["farma", "genarm", "eft"])
def test_wide_guides_by_name(run: Callable, lm: str, vocabulary_rm: str, name: str, support: str) -> None:
    source = f"{name}:{vocabulary_rm}" + (f",{lm}" if name == "eft" else "")
    args = ("--lm", lm, "--reward", source, "--support", support, "--max-new-tokens", 4, "--json")
    outcome = run("generate", "is tea safe?", *args)
    assert outcome.code == 0, outcome.err
    (row,) = outcome.rows
    calls = {"eft": 2}.get(name, 1)
    assert row["stats"]["reward_tokens"] == calls * row["stats"]["tokens"]
    explained = run("explain", "is tea safe?", *args[:-1], "--k", 3)
    assert explained.code == 0, explained.err


@pytest.mark.parametrize("name", ["pargs", "args", "cd-fudge", "rad", "rad-inverse"])
def test_scalar_guides_by_name(run: Callable, lm: str, rm: str, name: str) -> None:
    args = ("--lm", lm, "--reward", f"{name}:{rm}", "--max-new-tokens", 4, "--k", 3, "--json")
    outcome = run("generate", "is tea safe?", *args)
    assert outcome.code == 0, outcome.err
    (row,) = outcome.rows
    assert row["stats"]["reward_tokens"] == 3 * row["stats"]["tokens"]
    assert not name.startswith("rad") or 0 <= row["reward"] <= 1


def test_weights_in_a_prompts_file(
    run: Callable, lm: str, rm: str, vocabulary_rm: str, prompts_file: Callable, tmp_path: Path
) -> None:
    rows = [{"prompt": "is tea safe?"}] * 3
    rows = [row | w for row, w in zip(rows, ({}, {"weights": [1, 0]}, {"weights": [1, 2, 3]}), strict=True)]
    mixture = f"mixture:1*pargs:{rm}+0.5*farma:{vocabulary_rm}"
    output = tmp_path / "answers.jsonl"
    args = ("--lm", lm, "--max-new-tokens", 4, "--temperature", 0, "--output", output)
    outcome = run("generate", "--input", prompts_file(*rows), "--reward", mixture, *args)
    assert "3 weights in the guidance and this decoder mixes 2 rewards" in outcome.error
    answers = read_rows(output)
    assert [row.get("weights") for row in answers] == [None, [1, 0]]
    alone = run("generate", "is tea safe?", "--lm", lm, "--reward", rm, *args[2:6], "--json").rows[0]
    assert answers[1]["tokens"] == alone["tokens"]


def test_names_that_cannot_be(run: Callable, lm: str, rm: str) -> None:
    for name, message in (
        ("farma:", "names no model"),
        (f"farma:{rm}", "needs a vocabulary head"),
        ("eft:one", "needs two"),
        ("mixture:nothing", "is not a term of a mixture"),
    ):
        assert message in run("generate", "hello", "--lm", lm, "--reward", name).error


def test_a_gate(run: Callable, lm: str, rm: str) -> None:
    args = ("--lm", lm, "--max-new-tokens", 6, "--json", "--gate-entropy")
    (closed,) = run("generate", "is tea safe?", "--reward", rm, *args, 50).rows
    assert closed["gate_entropy"] == 50
    assert (closed["stats"]["guided_tokens"], closed["stats"]["reward_calls"]) == (0, 0)
    assert closed["reward"] is None
    refused = run("generate", "why?", "--better", "Be kind.", "--worse", "Be rude.", *args, 1)
    assert "can catch up with skipped tokens" in refused.error
