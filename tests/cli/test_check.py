"""`rgtg-fast check`: it agrees with `generate` on every kind of model, and says why in one line where it refuses."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.harness import RESULTS
from benchmarks.report.blocks import BLOCKS, PAGES, Block, ReportData
from benchmarks.report.pages import current_block
from tests.models.kinds import Kind, all_kinds
from tests.models.kinds.table import read_rows, write_row
from tests.models.kinds.tiny import (
    CHAT_TEMPLATE,
    byte_tokenizer,
    language_model,
    llama,
    llama_reward,
    reward_model,
    save,
)

# Names the CSV that the tests write their rows to.
TABLE = "RGTG_FAST_MODELS_CSV"
SHORT = ("--max-new-tokens", 4, "--temperature", 0)
KINDS = all_kinds()


def test_names_are_unique_in_their_table() -> None:
    names = [(kind.group, kind.name) for kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(bool(kind.served) != bool(kind.refused) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.group}-{kind.name}")
def test_check_and_generate_agree(run: Callable, tmp_path: Path, own_folders: Path, kind: Kind) -> None:
    if kind.needs and importlib.util.find_spec(kind.needs) is None:
        pytest.skip(f"{kind.needs} is not installed")
    given = kind.build(tmp_path)
    models = ("--lm", given.lm, "--reward", given.reward, *given.options)
    checked = run("check", *models, "--json")
    answered = run("generate", "How do I learn to swim?", *models, *SHORT, "--json")
    assert checked.code == answered.code, (checked.err, answered.err)
    (report,) = checked.rows
    if kind.refused:
        assert checked.error == answered.error
        assert kind.refused in checked.error
        assert report["reason"] in checked.error
    else:
        assert checked.code == 0, checked.err
        found = report["cached_vs_uncached"]
        assert found["tokens"] > 0
        assert found["logprob"] <= 1e-4
        assert (found["reward"] is None) == (given.reward == "none")
        assert (found["reward"] or 0) <= 1e-4
    assert report["served"] == (checked.code == 0)
    if TABLE in os.environ:
        write_row(Path(os.environ[TABLE]), kind, report)


def test_the_report_as_text(run: Callable, tmp_path: Path) -> None:
    reward = f"mixture:0.5*pargs:{llama_reward(tmp_path)}+2*contrastive"
    given = ("--lm", llama(tmp_path), "--reward", reward, "--max-length", 300, "--prompt", "Hi\x1b")
    checked = run("check", *given)
    assert checked.code == 0
    rows = [line.split("  ", 1) for line in checked.out.splitlines() if not line.startswith(" ")]
    report = {name.strip(): value.strip() for name, value in rows}
    assert report["language model"].endswith("lm (LlamaForCausalLM)")
    assert report["reward model"].endswith("rm (LlamaForSequenceClassification)")
    assert report["mixture"].startswith("MixtureReward(0.5*SequenceReward(")
    assert report["memory of a row"].startswith("300.0 KiB for 300 tokens")
    assert "differ by" in report["cached vs uncached"]
    for part in (
        "native: fused C++ layers can execute it",
        "linear, 32 to 1",
        "512 tokens, used up to 300",
        r'language model reads: "<s>user: Hi\u001b</s><s>assistant: "',
        "<s>system: You are careless and rude.",
        "gives the same ids as the language model's",
    ):
        assert part in checked.out
    assert "\x1b" not in checked.out


def test_memory_is_what_the_caches_take(run: Callable, tmp_path: Path) -> None:
    """2·L·G·D·bytes for a token of each model; contrastive prompts are two more rows."""
    lm, rm = llama(tmp_path), llama_reward(tmp_path)
    per_token, weights = 2 * 2 * 2 * 8 * 4, {}
    for reward, rows in (("none", 1), (rm, 2), ("contrastive", 3), (f"text:{rm}", 1)):
        (report,) = run("check", "--lm", lm, "--reward", reward, "--max-length", 300, "--json").rows
        memory = report["memory"]
        assert memory["row_tokens"] == 300
        assert memory["row_bytes"] == rows * 300 * per_token
        assert memory["rows_that_fit"] == memory["free_bytes"] // memory["row_bytes"]
        weights[reward] = memory["weight_bytes"]
    saved = sum(x.numel() * 4 for x in load_file(Path(lm, "model.safetensors")).values())
    # The frequencies of the rotary embedding are buffers that are not saved: twice 4 numbers.
    assert weights["none"] == weights["contrastive"] == saved + 2 * 4 * 4
    assert weights[rm] == weights[f"text:{rm}"] > weights["none"]


def test_a_template_that_differs_is_part_of_the_report(run: Callable, tmp_path: Path) -> None:
    thinks = CHAT_TEMPLATE.replace("}}: ", "}}: {% if m['role'] == 'assistant' %}<t></t>{% endif %}")
    lm = save(language_model("llama"), tmp_path / "lm", byte_tokenizer(thinks))
    rm = save(reward_model("llama"), tmp_path / "rm", byte_tokenizer(" " + thinks))
    (report,) = run("check", "--lm", lm, "--reward", rm, "--json").rows
    assert report["served"]
    (warning,) = report["warnings"]
    assert f"the chat template of the language model {lm} reads a whole chat as" in warning
    assert [prompt["text"].endswith("assistant: <t></t>") for prompt in report["prompts"]] == [False, True]
    assert report["template"] == warning
    lines = run("check", "--lm", lm, "--reward", rm).out.splitlines()
    assert [line for line in lines if line.startswith("warning")] == [f"{'warning':<22}  {warning}"]


def test_a_template_that_differs_for_texts_alone_is_shown_and_no_warning(
    run: Callable, tmp_path: Path
) -> None:
    template = CHAT_TEMPLATE.replace("assistant: {%", "assistant:{%")
    lm = save(language_model("llama"), tmp_path / "lm", byte_tokenizer(template))
    (report,) = run("check", "--lm", lm, "--reward", "none", "--json").rows
    assert report["warnings"] == []
    assert "an answer that you pass as text" in report["template"]
    assert report["template"] in run("check", "--lm", lm, "--reward", "none").out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lm, rm: {"--lm": "/no/such/model"}, ["/no/such/model", "does not exist"]),
        (lambda lm, rm: {"--reward": "/no/such/model"}, ["/no/such/model", "does not exist"]),
        (lambda lm, rm: {"--reward": "text:/no/such/model"}, ["/no/such/model", "does not exist"]),
        (lambda lm, rm: {"--reward": lm}, ["2 labels", "LlamaForCausalLM"]),
        (lambda lm, rm: {"--lm": rm}, ["is a reward model", "pass it as reward"]),
        (lambda lm, rm: {"--reward": f"eft:{lm}"}, ["names one model and needs two"]),
        (lambda lm, rm: {"--reward": "mixture:rm"}, ["is not a term of a mixture"]),
        (lambda lm, rm: {"--reward": "bundled:pargs"}, ["bundled:pargs cannot guide"]),
        (lambda lm, rm: {"--max-length": 1}, ["max_length=1"]),
        (lambda lm, rm: {"--max-length": 20}, ["43 tokens", "exceed its 20"]),
        (lambda lm, rm: {"--max-batch": 0}, ["max_batch=0"]),
        (lambda lm, rm: {"--engine": "steam"}, ["engine='steam'"]),
        (lambda lm, rm: {"--prompt": ""}, ["the prompt is empty"]),
    ],
)
def test_bad_input_is_one_line(run: Callable, tmp_path: Path, change: Callable, words: list[str]) -> None:
    lm, rm = llama(tmp_path), llama_reward(tmp_path)
    given = {"--lm": lm, "--reward": rm, **change(lm, rm)}
    options = [part for pair in given.items() for part in pair]
    outcome = run("check", *options)
    assert outcome.out == ""
    for word in words:
        assert word in outcome.error
    if "--prompt" not in given:
        (report,) = run("check", *options, "--json").rows
        assert not report["served"]
        assert report["reason"] in outcome.error


def test_a_prompt_that_cannot_be_answered_has_one_reason(run: Callable, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the models have embeddings."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    lm = save(language_model("llama"), tmp_path / "lm", tokenizer)
    rm = save(reward_model("llama"), tmp_path / "rm", tokenizer)
    for reward in (rm, f"text:{rm}"):
        models = ("--lm", lm, "--reward", reward)
        assert run("check", *models).code == 0
        checked, answered = (
            run("check", *models, "--prompt", "<more>"),
            run("generate", "<more>", *models, *SHORT),
        )
        assert "token id 259, outside the vocabulary (V=259)" in checked.error
        assert checked.error == answered.error


def test_the_table_of_the_documentation_has_a_row_for_each_kind() -> None:
    """After a change: RGTG_FAST_MODELS_CSV=benchmarks/results/models.csv pytest tests/cli/test_check.py -k agree."""
    rows = read_rows(RESULTS / "models.csv")
    expected = [
        (kind.name, kind.group, "served" if kind.served else "refused", kind.served or kind.refused)
        for kind in KINDS
    ]
    assert [(row["name"], row["group"], row["outcome"], row["how"]) for row in rows] == expected
    for row in rows:
        assert (row["largest_difference"] != "") == (row["outcome"] == "served")
        assert float(row["largest_difference"] or 0) <= 1e-4


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.page == "models"], ids=lambda b: b.name)
def test_the_documentation_shows_the_table(block: Block) -> None:
    """After a change: python -m benchmarks.report."""
    assert current_block(PAGES["models"], block.name) == block.text(ReportData([]))
