"""`rgtg-fast explain`: the candidates of every token as a colored table and as a self-contained HTML page."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rgtg_fast.cli.jobs import check_prompt
from rgtg_fast.cli.options import argument, include, json_option
from rgtg_fast.cli.session import Decoding, Setup, decode_with
from rgtg_fast.cli.terminal import console, note, print_json, read_stdin, status
from rgtg_fast.config import OUTPUT, option
from rgtg_fast.evaluation.study.page import escape
from rgtg_fast.files import check_writable, write_text

if TYPE_CHECKING:
    from rgtg_fast.engine.outputs import Candidate, Step

BAR_WIDTH = 12
EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Show every token's candidates: log-probability, reward, final probability, and which was chosen."""

    prompt: str = argument("The prompt; `-` reads it from stdin.")
    html: Path | None = option("Write a self-contained HTML page here.", None, OUTPUT)
    show: int | None = option("Candidates of each token in the table.", None, OUTPUT, shown="all", min=1)
    json: bool = json_option()
    setup: Setup = include("lm reward reward_label better worse dtype device engine chat")
    decoding: Decoding = include(
        "k beta temperature support seed max_new_tokens stop max_length", max_new_tokens=24
    )

    def run(self) -> None:
        """Answers the prompt and prints the trace."""
        text = read_stdin() if self.prompt == "-" else self.prompt
        check_prompt(text)
        options, guidance = self.decoding, self.decoding.guidance()
        setup = self.setup.with_reward(options.support)
        if self.html is not None:
            check_writable(self.html)
        with status("Loading") as progress:
            decoder = setup.decoder(progress, max_batch=1, max_length=options.max_length)
            progress("Answering")
            row = decoder.generate(
                [setup.as_chat(text, decoder)],
                max_new_tokens=options.max_new_tokens,
                guidance=guidance,
                seed=options.seed,
                stop=options.stop,
                trace=True,
            )[0]
        steps, decode = row.trace or [], decode_with(decoder)
        settings = {name: getattr(options, name) for name in ("k", "beta", "temperature", "support", "seed")}
        names = setup.names()
        if self.html is not None:
            facts = {"model": names["lm"], "reward": names["reward_model"], **settings}
            write_text(self.html, page(text, steps, decode, {k: str(v) for k, v in facts.items()}))
        if self.json:
            answer = {"text": row.text, "finish_reason": row.finish_reason, "reward": row.reward}
            listed = [as_dict(step) for step in steps]
            print_json({"prompt": text, **names, **settings, **answer, "steps": listed})
            return
        out = console()
        out.print(table(steps, self.show))
        out.print()
        out.print(marked_answer(steps, decode))
        if self.html is not None:
            note(f"written: {self.html}")


def visible(text: str) -> str:
    """A token's text with visible white space and control characters."""
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown) or "∅"


def changed(step: "Step") -> bool:
    """Whether the reward changed the token: with β = 0 and the same noise another one would have been chosen."""
    return step.token != step.base_token


def as_dict(step: "Step") -> dict[str, Any]:
    """A step as plain values, for JSON."""
    row = asdict(step)
    candidates = row.pop("candidates")
    return {**row, "changed": changed(step), "candidates": candidates}


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of `share` (0 to 1) of `width` characters, in steps of an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


def pieces(steps: "list[Step]", decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the answer's text."""
    return added_texts([step.token for step in steps], decode)


def added_texts(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text; a token that ends within a character adds nothing."""
    texts, shown = [], 0
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count])
        end = len(text) if count == len(tokens) else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        texts.append(text[shown:end])
        shown = max(shown, end)
    return texts


def marked_answer(steps: "list[Step]", decode: Callable[[list[int]], str]) -> Text:
    """The answer with the tokens that the reward changed highlighted."""
    text = Text()
    for step, piece in zip(steps, pieces(steps, decode), strict=True):
        text.append(piece, style="bold black on yellow" if changed(step) else "")
    return text


def table(steps: "list[Step]", show: int | None = None) -> RenderableType:
    """The candidates of every step as a colored table.

    Args:
        steps: the trace of one answer.
        show: maximum number of candidates of each step, besides the chosen one; None shows all.
    """
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("#", justify="right", style="dim")
    grid.add_column("token")
    grid.add_column("log p", justify="right")
    grid.add_column("reward", justify="right")
    grid.add_column("final", justify="right")
    grid.add_column("", min_width=BAR_WIDTH)
    grid.add_column("")
    for step in steps:
        low, high = _range([c.reward for c in step.candidates])
        for rank, c in enumerate(_shown(step, show)):
            style = "bold green" if c.chosen else ""
            notes = []
            if c.chosen:
                notes.append(Text("◀ chosen", "bold green"))
            if c.token == step.base_token and not c.chosen:
                notes.append(Text("unguided choice", "yellow"))
            if c.chosen and changed(step):
                notes.append(Text(" changed ", "black on yellow"))
            grid.add_row(
                str(step.position) if rank == 0 else "",
                Text(visible(c.text), style=style),
                _number(c.logprob, 3),
                Text(_number(c.reward, 3), style=_reward_style(c.reward, low, high)),
                Text(_percent(c.probability), style=style),
                Text(bar(c.probability), style="green" if c.chosen else "cyan"),
                Text(" ").join(notes),
                end_section=False,
            )
        grid.add_row()
    legend = Text.assemble(
        ("log p: base model, natural logarithm · final: probability after guidance\n", "dim"),
        (" changed ", "black on yellow"),
        (f": {sum(map(changed, steps))} of {len(steps)} tokens", "dim"),
    )
    return Group(grid, legend)


def _shown(step: "Step", show: int | None) -> "list[Candidate]":
    candidates = sorted(step.candidates, key=lambda c: -c.probability)
    if show is None or show >= len(candidates):
        return candidates
    kept = candidates[:show]
    wanted = [c for c in candidates[show:] if c.chosen or c.token == step.base_token]
    return kept + wanted


def _range(values: list[float | None]) -> tuple[float, float]:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def _relative(value: float | None, low: float, high: float) -> float | None:
    """Position of a reward among the step's rewards, from 0 (lowest) to 1 (highest)."""
    if value is None or not math.isfinite(value) or high <= low:
        return None
    return (value - low) / (high - low)


def _reward_style(value: float | None, low: float, high: float) -> str:
    place = _relative(value, low, high)
    return "dim" if place is None else _of_place(place, "green", "red", "")


def _of_place(place: float | None, best: str, worst: str, other: str) -> str:
    """Chooses by whether a reward is in the highest or the lowest third of the step's range."""
    if place is None:
        return other
    return best if place > 2 / 3 else worst if place < 1 / 3 else other


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def page(
    prompt: str, steps: "list[Step]", decode: Callable[[list[int]], str], facts: Mapping[str, str]
) -> str:
    """A self-contained HTML page: the answer with its changed tokens, and every step's candidates.

    Args:
        prompt: the prompt as text.
        steps: the trace of the answer.
        decode: token ids to text.
        facts: what to show under the title, for instance models and guidance; name to value.
    """
    count = sum(map(changed, steps))
    answer = "".join(map(_link, range(len(steps)), steps, pieces(steps, decode)))
    sections = "\n".join(_section(n, step) for n, step in enumerate(steps))
    rest = f"""<p class="key"><span class="tag">changed</span> The reward model changed {count} of {len(steps)} tokens:
with the same noise the base model alone would have taken the candidate with the dotted underline.
Click on a token to see its candidates.</p>
<h2>Candidates</h2>
<div class="steps">
{sections}
</div>"""
    return html_page("Guided answer", "Why each token was chosen", prompt, answer, rest, facts)


def html_page(title: str, heading: str, prompt: str, answer: str, rest: str, facts: Mapping[str, str]) -> str:
    """An HTML page about one answer.

    The page loads nothing from anywhere, runs no script, follows the reader's light or dark setting and prints well.

    Args:
        title: title of the window, before the prompt.
        heading: heading of the page.
        prompt: the prompt as text.
        answer: the answer as HTML.
        rest: HTML under the answer.
        facts: what to show under the heading; name to value.
    """
    style = files("rgtg_fast.cli").joinpath("explain.css").read_text(encoding="utf-8")
    about = " · ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {escape(prompt[:60])}</title>
<style>
{style}</style>
</head>
<body>
<h1>{heading}</h1>
<p class="sub">{about}</p>
<h2>Prompt</h2>
<div class="box">{escape(prompt)}</div>
<h2>Answer</h2>
<div class="box answer">{answer}</div>
{rest}
</body>
</html>
"""


def _link(n: int, step: "Step", text: str) -> str:
    mark = ' class="changed"' if changed(step) else ""
    return f'<a href="#t{n}"{mark} title="{escape(_summary(step))}">{escape(text)}</a>'


def _summary(step: "Step") -> str:
    base = next((c.text for c in step.candidates if c.token == step.base_token), None)
    if not changed(step):
        return f"{visible(step.text)}: unchanged"
    return f"{visible(step.text)}, unguided {visible(base) if base is not None else step.base_token}"


def _section(n: int, step: "Step") -> str:
    low, high = _range([c.reward for c in step.candidates])
    rows = []
    for c in sorted(step.candidates, key=lambda c: -c.probability):
        place = _relative(c.reward, low, high)
        shade = _of_place(place, ' class="good"', ' class="bad"', "")
        kinds = [name for name, on in (("chosen", c.chosen), ("base", c.token == step.base_token)) if on]
        rows.append(
            f'<tr class="{" ".join(kinds)}">'
            f'<td title="token {c.token}"><code>{escape(visible(c.text))}</code></td>'
            f"<td>{_number(c.logprob, 2)}</td><td{shade}>{_number(c.reward, 3)}</td>"
            f'<td class="p"><i style="width:{100 * min(max(c.probability, 0.0), 1.0):.2f}%"></i>'
            f"<span>{_percent(c.probability)}</span></td></tr>"
        )
    tag = '<span class="tag">changed</span>' if changed(step) else ""
    return (
        f'<section id="t{n}"><header><span class="n">{step.position}</span>'
        f"<code>{escape(visible(step.text))}</code>{tag}"
        f'<span class="e">entropy {step.entropy:.2f} nats</span></header>'
        f"<table><thead><tr><th>candidate</th><th>log p</th><th>reward</th><th>final</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )
