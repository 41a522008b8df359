"""`rgtg-fast check`: what will happen with a language model and a reward, before a long run."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from rgtg_fast.cli.jobs import check_prompt
from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import Decoding, Progress, Setup
from rgtg_fast.cli.terminal import USER_ERROR, complain, print_json, print_line, status
from rgtg_fast.config import LENGTH, option
from rgtg_fast.errors import RGTGError
from rgtg_fast.plaintext import printable

# Characters of a rendered prompt that the text view shows, from its beginning and its end.
_SHOWN = 400


@dataclass(frozen=True, kw_only=True)
class Check:
    """Load the models as `generate` does and say what will happen: engines, templates, tokenizers, exactness, memory.

    Exit code 2, and one line on why, where `generate` would refuse them.
    """

    json: bool = json_option()
    prompt: str = option("The prompt of the probe.", "How do I learn to swim?", LENGTH)
    setup: Setup = include()
    lengths: Decoding = include("max_batch max_length")

    def run(self) -> None:
        """Prints the report.

        Raises:
            Exit: with code 2, the models cannot be used together.
        """
        check_prompt(self.prompt)
        setup = self.setup.with_reward()
        names = setup.names()
        with warnings.catch_warnings(record=True) as caught, status("Loading") as progress:
            warnings.simplefilter("default", UserWarning)
            try:
                facts, reason = self._facts(setup, progress), None
            except RGTGError as error:
                facts, reason = {}, str(error)
        told = list(dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning))
        if self.json:
            print_json({"served": reason is None, "reason": reason, **names, **facts, "warnings": told})
        elif reason is None:
            for name, value in _lines({**names, **facts, "warnings": told}):
                print_line(f"{name:<22}  {value}")
        if reason is not None:
            complain(reason)
            raise typer.Exit(USER_ERROR)

    def _facts(self, setup: Setup, progress: Progress) -> dict[str, Any]:
        from rgtg_fast.evaluation.inspection import inspect_decoder

        decoder = setup.decoder(
            progress, max_batch=self.lengths.max_batch, max_length=self.lengths.max_length
        )
        progress("Comparing with the models' own forwards")
        return inspect_decoder(decoder, setup.as_chat(self.prompt, decoder))


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as (name, value) pairs of text, in reading order."""
    for model in report["models"]:
        yield from _model_lines(model)
    if len(report["rewards"]) > 1:
        yield "mixture", report["reward"]
    for reward in report["rewards"]:
        yield "reward", reward["name"]
        if reward["trunk"] is not None:
            yield "  model", reward["trunk"]
        if reward["heads"]:
            yield "  head", "; ".join(reward["heads"])
        every = "every token at once" if reward["scores_vocabulary"] else "the k candidates of a step"
        yield "  scores", every
    yield "device", report["device"]
    prompts = {(each["reader"], each["text"]): each["tokens"] for each in report["prompts"]}
    for (reader, text), tokens in prompts.items():
        yield f"prompt ({tokens} tokens)", f"{reader} reads: {_shortened(text)}"
    for tokenizer in report["tokenizers"]:
        difference = tokenizer["difference"]
        same = "gives the same ids as the language model's"
        other = f"and the language model's {difference}: answers reach it as text"
        yield "tokenizer", f"that of {tokenizer['of']} {same if difference is None else other}"
    yield "cached vs uncached", _compared(report)
    yield from _memory_lines(report["memory"], report["max_batch"])
    # A difference that does not change what is decoded is no warning when the models are loaded.
    template = [report["template"]] if report["template"] is not None else []
    for warning in dict.fromkeys([*report["warnings"], *template]):
        yield "warning", warning


def _model_lines(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield model["role"], f"{model['name']} ({model['architecture']})"
    quantized = "" if model["quantization"] is None else f", quantized ({model['quantization']})"
    size = f"{model['parameters']:,} parameters, {model['dtype']}{quantized}, {_size(model['weight_bytes'])}"
    yield "  weights", size
    yield "  engine", f"{model['engine']}: {model['why']}"
    limit = "" if model["limit"] in (None, model["context"]) else f", used up to {model['limit']:,}"
    if model["context"] is not None:
        yield "  context", f"{model['context']:,} tokens{limit}"
    if model["window"] is not None:
        window, reach = model["window"], model["limit"] or model["context"]
        unused = ", longer than any row" if reach is not None and window["tokens"] >= reach else ""
        yield (
            "  window",
            f"{window['tokens']:,} tokens in {window['layers']} of {window['of']} layers{unused}",
        )


def _compared(report: dict[str, Any]) -> str:
    found = report["cached_vs_uncached"]
    reward = "" if found["reward"] is None else f" and rewards by {found['reward']:.1e}"
    return f"log-probabilities differ by {found['logprob']:.1e}{reward} at most over {found['tokens']} tokens"


def _memory_lines(memory: dict[str, Any], max_batch: int) -> Iterator[tuple[str, str]]:
    yield "memory of the weights", _size(memory["weight_bytes"])
    row = f"{_size(memory['row_bytes'])} for {memory['row_tokens']:,} tokens in the caches"
    yield "memory of a row", f"{row}; --max-length sets their number"
    if memory["free_bytes"] is not None:
        fit = memory["rows_that_fit"]
        yield (
            "free memory",
            f"{_size(memory['free_bytes'])}, room for {fit:,} such rows (--max-batch {max_batch})",
        )


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _shortened(text: str) -> str:
    """A rendered prompt in one line, with its control characters as codes and the middle of a long one left out."""
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return printable(json.dumps(shown, ensure_ascii=False))
