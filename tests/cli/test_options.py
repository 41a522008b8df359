"""Every option of every command is checked before a model is loaded, and a bad value is one line."""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import transformers

from rgtg_fast import RGTGError
from rgtg_fast.cli import main as cli
from rgtg_fast.training.data import rows

LOADED = "a model was to be loaded"
LONG = "a" * 300
TEXTS = (f"{LONG}/x", "a\0b", "[/]\x1b[31m", "")
NUMBERS = ("x", "nan", "-1", "9" * 40)
# What the model decides, or where any number will do.
ANY = {
    ("generate", "--seed", "-1"),
    ("explain", "--seed", "-1"),
    ("demo", "--seed", "-1"),
    ("bench", "--seed", "-1"),
    *(
        (command, "--beta", value)
        for command in ("generate", "explain", "demo", "export")
        for value in ("-1", "9" * 40)
    ),
    *((command, "--temperature", "9" * 40) for command in ("generate", "explain", "demo", "train-policy")),
    ("generate", "--gate-entropy", "9" * 40),
}
# Limits that are known once the model is.
LATE = {"--k", "--max-new-tokens", "--max-length", "--fork-layer", "--seed", "--max-batch", "--show"}
# More than there is of something is all of it.
LARGE = {"--limit", "--max-length", "--save-steps", "--eval-steps", "--log-steps", "--batch-tokens"}
FLOATS = {
    "--beta-r",
    "--lr",
    "--head-lr",
    "--head-fit",
    "--lora-alpha",
    "--weight-decay",
    "--beta",
    "--alpha",
}
FLOATS |= {"--margin"}


def options() -> Iterator[tuple[str, str, type]]:
    """Command, option and type of everything that takes a value."""
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        for parameter in inspect.signature(command.callback).parameters.values():
            kind, *more = get_args(parameter.annotation)
            assert get_origin(parameter.annotation) is Annotated
            kinds = [k for k in (kind, *get_args(kind)) if k in (int, float, str, Path)]
            if not kinds or type(more[0]).__name__ != "OptionInfo":
                continue
            given = [flag for flag in more[0].param_decls or () if flag.startswith("--")]
            flag = given[0] if given else f"--{parameter.name.replace('_', '-')}"
            yield name, flag, kinds[0]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """A command with arguments that are right, up to its models, which nobody can load."""

    def load(*args: Any, **options: Any) -> None:
        raise RGTGError(LOADED)

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)
    monkeypatch.setattr(rows, "_from_datasets", load)
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pairs, study = tmp_path / "pairs.jsonl", tmp_path / "study.yaml"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    study.write_text("model: some/model\nprompts: [ab]\nmethods:\n  - {name: unguided, reward: none}\n")
    folder = str(tmp_path / "new")
    commands = {
        "generate": ["generate", "hi", "--lm", "some/model"],
        "check": ["check", "--lm", "some/model"],
        "explain": ["explain", "hi", "--lm", "some/model"],
        "demo": ["demo", "--lm", "some/model"],
        "bench": ["bench", "--lm", "some/model"],
        "train": ["train", "--data", str(pairs), "--output", folder, "--model", "some/model"],
        "train-policy": ["train-policy", "--data", str(pairs), "--output", folder, "--model", "some/model"],
        "token-rewards": ["token-rewards", "hi", "there", "--lm", "some/model"],
        "accuracy": ["accuracy", "--reward", "some/guide", "--data", str(pairs), "--lm", "some/model"],
        "evaluate": ["evaluate", "--config", str(study), "--output", folder],
        "export": ["export", "--lm", "some/model", "--output", folder],
    }
    return lambda command: list(commands[command])


def one_line(outcome: Any, args: list[str]) -> str:
    assert outcome.code == 2, (args, outcome)
    assert outcome.out == ""
    assert len(outcome.errors) == 1, (args, outcome.err)
    return outcome.errors[0]


@pytest.mark.parametrize(
    "command", ["generate", "explain", "demo", "bench", "train", "train-policy", "accuracy", "export"]
)
def test_numbers(run: Callable, base: Callable, command: str) -> None:
    checked = 0
    for name, flag, kind in options():
        if name != command or kind not in (int, float):
            continue
        for value in NUMBERS:
            args = [*base(command), flag, value]
            error = one_line(run(*args), args)
            checked += 1
            allowed = (
                (name, flag, value) in ANY or flag in LATE or (flag in LARGE | FLOATS and value == "9" * 40)
            )
            if not allowed:
                assert LOADED not in error, (args, error)
    assert checked > 10


def test_texts_and_paths(run: Callable, base: Callable) -> None:
    checked = 0
    for command, flag, kind in options():
        if kind not in (str, Path):
            continue
        for value in TEXTS[: 4 if kind is str else 3]:
            args = [*base(command), flag, value]
            error = one_line(run(*args), args)
            assert "\x1b" not in error
            assert "\0" not in error
            checked += 1
    assert checked > 150


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:99", "nonsense", "", "a\0b"])
@pytest.mark.parametrize(
    "command", ["generate", "explain", "demo", "bench", "train", "train-policy", "accuracy", "export"]
)
def test_devices_that_there_are_not(run: Callable, base: Callable, command: str, device: str) -> None:
    assert "device=" in one_line(run(*base(command), "--device", device), [command, device])


@pytest.mark.parametrize(
    ("command", "option", "value", "word"),
    [
        ("train", "--seed", 2**32, "seed"),
        ("train", "--report-to", "nonsense", "report_to"),
        ("train", "--held-out", "1", "held_out"),
        ("train", "--epochs", "1e9", "epochs"),
        ("train", "--lora-rank", 2**62, "rank"),
        ("train", "--figure", "figure.xyz", ".png"),
        ("train", "--figure", "no/such/figure.png", "does not exist"),
        ("train-policy", "--seed", 2**32, "seed"),
        ("train-policy", "--report-to", "nonsense", "report_to"),
        ("train-policy", "--batch", 2**31, "batch_size"),
        ("accuracy", "--batch-tokens", 0, "--batch-tokens"),
        ("accuracy", "--data", "", "empty"),
        ("accuracy", "--figure", "figure.xyz", ".png"),
        ("bench", "--seed", 2**64, "seed"),
        ("bench", "--threads", 2**40, "threads"),
        ("generate", "--max-batch", 0, "max_batch"),
        ("evaluate", "--methods", ",", "--methods"),
        ("evaluate", "--output", " ", "output"),
    ],
)
def test_values_out_of_range(
    run: Callable, base: Callable, command: str, option: str, value: object, word: str
) -> None:
    error = one_line(run(*base(command), option, value), [command, option])
    assert word in error
    assert LOADED not in error
    assert not Path("new").exists()
