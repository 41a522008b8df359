"""`rgtg-fast` with `demo`, `explain`, `bench`, `env` and help."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rgtg_fast import Guidance, RewardGuidedDecoder
from rgtg_fast.bench import baselines
from rgtg_fast.bundled import embedded
from rgtg_fast.cli import demo, explain
from rgtg_fast.engine.outputs import Candidate, Step
from rgtg_fast.ops._extension import instruction_set
from rgtg_fast.ops._registry import OPS
from tests.cli.support import environment

HELP = """
import sys
from rgtg_fast.cli import main as cli
try:
    cli.main(["--help"])
except SystemExit as end:
    loaded = {"torch", "transformers", "numpy"} & set(sys.modules)
    sys.exit(end.code or (f"loaded: {loaded}" if loaded else 0))
"""


def test_help_is_instant_and_lists_the_commands() -> None:
    """Instant: nothing is loaded that takes its time."""
    outcome = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, env=environment())
    assert outcome.returncode == 0, outcome.stderr
    for name in ("demo", "generate", "explain", "bench", "env"):
        assert name in outcome.stdout


def test_unknown_command(run: Callable) -> None:
    assert "nonsense" in run("nonsense").error


def test_version(run: Callable) -> None:
    assert run("--version").out.startswith("rgtg-fast ")


def test_env(run: Callable) -> None:
    report = json.loads(run("env", "--json").out)
    assert report["packages"]["torch"]
    assert set(report["backends"]["cpu"]) == set(OPS)
    assert len(OPS) == 11
    isa = instruction_set()
    assert isa is None or report["extension"] == f"C++, instruction set {isa}"
    text = run("env").out
    for word in ("torch", "transformers", "extension", "topk_logprobs", "embedded model"):
        assert word in text


class Page(HTMLParser):
    """Collects what a page contains and checks that every element is closed."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_explain(run: Callable, tmp_path: Path, lm: str, rm: str) -> None:
    page = tmp_path / "page.html"
    args = ("explain", "is <b>this</b> & that safe?", "--lm", lm, "--reward", rm, "--k", 5, "--seed", 2)
    args = (*args, "--max-new-tokens", 6, "--temperature", 1)
    outcome = run(*args, "--json", "--html", page)
    assert outcome.code == 0, outcome.err
    (answer,) = outcome.rows
    assert len(answer["steps"]) >= 1
    for step in answer["steps"]:
        assert len(step["candidates"]) == 5
        assert sum(c["probability"] for c in step["candidates"]) == pytest.approx(1, abs=1e-4)
        (chosen,) = [c for c in step["candidates"] if c["chosen"]]
        assert chosen["token"] == step["token"]
        assert step["changed"] == (step["token"] != step["base_token"])
    html = Page(page.read_text(encoding="utf-8"))
    assert html.count["section"] == len(answer["steps"])
    assert "b" not in html.count
    assert "script" not in html.count
    assert "is <b>this</b> & that safe?" in "".join(html.words)
    assert all(address.startswith("#") for address in html.addresses)
    table = run(*args)
    assert table.code == 0
    assert table.out.count("◀ chosen") == len(answer["steps"])


def test_explain_errors(run: Callable, tmp_path: Path, lm: str) -> None:
    args = ("explain", "hello", "--lm", lm, "--max-new-tokens", 2)
    assert "no folder" in run(*args, "--html", tmp_path / "no folder" / "page.html").error
    assert "--show" in run(*args, "--show", 0).error
    assert "empty" in run("explain", "", "--lm", lm).error


def step(text: str, chosen: int, base: int, candidates: list[tuple[int, str, float | None]]) -> Step:
    listed = [Candidate(t, s, -1.0, r, 1 / len(candidates), t == chosen) for t, s, r in candidates]
    return Step(0, chosen, text, 0.5, base, listed)


def test_page_survives_any_token() -> None:
    steps = [
        step("</a>", 0, 1, [(0, "</a>", 1.0), (1, '"><script>', -1.0)]),
        step("\n", 2, 2, [(2, "\n", None), (3, "\x00", None)]),
        step("", 4, 9, [(4, "", float("nan")), (5, "é", float("inf"))]),
    ]
    texts = {0: "</a>", 2: "\n", 4: ""}
    decode = lambda ids: "".join(texts[token] for token in ids)  # noqa: E731
    html = Page(explain.page("</div>", steps, decode, {"model": "<m>"}))
    assert "script" not in html.count
    assert html.count["section"] == 3


def test_pieces_wait_for_whole_characters() -> None:
    parts = {1: b"a", 2: b"\xf0\x9f", 3: b"\x98\x80", 4: b"\xff"}
    decode = lambda ids: b"".join(parts[t] for t in ids).decode("utf-8", "replace")  # noqa: E731
    steps = [step("", token, token, [(token, "", 0.0)]) for token in (1, 2, 3, 4)]
    assert explain.pieces(steps, decode) == ["a", "", "\N{GRINNING FACE}", "\N{REPLACEMENT CHARACTER}"]


def test_demo(run: Callable, lm: str, rm: str) -> None:
    args = ("demo", "--lm", lm, "--reward", rm, "--max-new-tokens", 8, "--beta", 5, "--temperature", 1)
    outcome = run(*args, "--prompt", "one", "--prompt", "two", "--json")
    assert outcome.code == 0, outcome.err
    (report,) = outcome.rows
    assert [entry["prompt"] for entry in report["prompts"]] == ["one", "two"]
    for entry in report["prompts"]:
        assert entry["guided"]["tokens"] <= 8
        assert isinstance(entry["unguided"]["mean_reward"], (float, type(None)))
    assert report["unguided_stats"]["reward_calls"] == 0
    assert report["guided_stats"]["reward_calls"] > 0
    text = run(*args).out
    for word in ("unguided", "guided", "mean reward", "tokens/s", "reward calls", "The reward model changed"):
        assert word in text


def test_demo_survives_an_answer_that_ends_at_once(lm: str) -> None:
    guide = RewardGuidedDecoder.from_pretrained(lm, reward=lambda prefix, ids: (ids == 2).float() * 1e4)
    alone = RewardGuidedDecoder.from_pretrained(lm)
    report = demo.run(guide, alone, ["hello"], 4, Guidance(k=guide.lm.vocabulary), seed=0)
    assert report.comparisons[0].guided.tokens == 0
    console = Console(record=True, width=120, file=io.StringIO())
    demo.show(report, console)
    assert "–" in console.export_text()


def test_demo_needs_a_guide(run: Callable, lm: str) -> None:
    assert "none" in run("demo", "--lm", lm, "--reward", "none").error


def test_bench(run: Callable, lm: str, rm: str) -> None:
    args = (
        "bench",
        "--lm",
        lm,
        "--rm",
        rm,
        "--prompt-length",
        8,
        "--k",
        3,
        "--new-tokens",
        4,
        "--repeats",
        1,
    )
    outcome = run(*args, "--json")
    assert outcome.code == 0, outcome.err
    (result,) = outcome.rows
    methods = ["ours", "args_replicated", "pargs_serial", "unguided"]
    assert [row["method"] for row in result["methods"]] == methods
    assert all(row["tokens_per_second"] > 0 for row in result["methods"])
    assert result["left_out"] == {}
    text = run(*args, "--methods", "ours,unguided").out
    assert "ours" in text
    assert "tokens/s" in text


def test_bench_with_a_second_language_model(run: Callable, lm: str) -> None:
    sizes = ("--prompt-length", 8, "--new-tokens", 4, "--repeats", 1)
    outcome = run("bench", "--lm", lm, *sizes, "--methods", "genarm_published,ours_genarm", "--json")
    assert outcome.code == 0, outcome.err
    (result,) = outcome.rows
    assert [row["equal_to_reference"] for row in result["methods"]] == [True, True]


def test_bench_names_what_had_no_memory(run: Callable, lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(baselines, "unguided", full)
    sizes = ("--prompt-length", 8, "--k", 3, "--new-tokens", 4, "--repeats", 1)
    text = run("bench", "--lm", lm, *sizes, "--methods", "ours,unguided").out
    assert "left out: unguided: the device's memory does not suffice" in text
    error = run("bench", "--lm", lm, *sizes, "--methods", "unguided").error
    assert "every method failed on cpu (unguided: the device's memory does not suffice)" in error


def test_bench_errors(run: Callable, lm: str) -> None:
    assert "magic" in run("bench", "--lm", lm, "--methods", "ours,magic").error
    assert "giant" in run("bench", "--shape", "giant").error


@pytest.fixture
def no_default_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_default_model_missing(
    run: Callable, monkeypatch: pytest.MonkeyPatch, no_default_model: Path
) -> None:
    monkeypatch.setattr(embedded, "weights_file", lambda: None)
    error = run("generate", "hello").error
    assert embedded.INSTALL_WEIGHTS in error
    assert "--lm" in error


def test_default_model_without_its_reader(
    run: Callable, monkeypatch: pytest.MonkeyPatch, no_default_model: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "weights_file", lambda: tmp_path / "model.gguf")
    find = embedded.importlib.util.find_spec
    monkeypatch.setattr(
        embedded.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    assert embedded.INSTALL_READERS in run("demo").error


def test_conversion_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, no_default_model: Path, tmp_path: Path
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "weights_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", fail)
    if any(embedded.importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        pytest.skip("gguf and accelerate are not installed")
    with pytest.raises(embedded.RGTGError, match="No space left"):
        embedded.default_model()
    assert embedded.converted_model() is None
    assert not list(no_default_model.iterdir())


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "here"))
    assert embedded.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("RGTG_CACHE")
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "rgtg-fast"


def test_no_command_shows_the_help(run: Callable) -> None:
    outcome = run()
    assert "generate" in outcome.out
    assert not outcome.errors


def test_white_space_and_control_characters_are_visible() -> None:
    assert explain.visible(" a\n") == "·a↵"
    assert explain.visible("\x07") == "\\u0007"
