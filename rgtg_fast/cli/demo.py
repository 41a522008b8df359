"""`rgtg-fast demo`: answers a few prompts with and without the reward model and shows what it changed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rgtg_fast.cli.explain import changed, marked_answer, visible
from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import BETA_HELP, CONTRASTIVE, NONE, Decoding, Setup, decode_with
from rgtg_fast.cli.terminal import console, print_json, status
from rgtg_fast.config import GUIDANCE, Guidance, option
from rgtg_fast.errors import RGTGError

if TYPE_CHECKING:
    from rgtg_fast import RewardGuidedDecoder, Step

PROMPTS = (
    "How can I fall asleep faster at night?",
    "I failed an important exam and feel terrible. What now?",
    "My colleague keeps interrupting me in meetings. What should I do?",
)
# On a narrower terminal, in columns, the two answers are printed one below the other.
SIDE_BY_SIDE = 90


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Answer a few prompts without and with the reward model, side by side."""

    prompt: list[str] | None = option("Your own prompt (repeatable).", None)
    setup: Setup = include("lm reward reward_label better worse dtype device engine")
    decoding: Decoding = include("k temperature seed max_new_tokens", temperature=0.7, max_new_tokens=48)
    beta: float | None = option(BETA_HELP, None, GUIDANCE, shown="5, contrastive 2", before="temperature")
    json: bool = json_option()

    def run(self) -> None:
        """Answers the prompts twice and prints the comparison."""
        setup, options = self.setup.with_reward(), self.decoding
        if setup.reward == NONE:
            raise RGTGError(
                "the demo compares with and without a reward model: --reward none leaves nothing to compare"
            )
        # Log-ratios of the contrastive reward are larger than the rewards of a small reward model.
        beta = (2.0 if setup.reward == CONTRASTIVE else 5.0) if self.beta is None else self.beta
        guidance = Guidance(options.k, beta, options.temperature)
        texts = self.prompt or list(PROMPTS)
        with status("Loading") as progress:
            pair = setup.pair(progress)
            decoder = setup.decoder(progress, pair, max_batch=len(texts))
            alone = replace(setup, reward=NONE, reward_label=None, better=None, worse=None)
            unguided = alone.decoder(progress, pair, max_batch=len(texts))
            prompts = [setup.as_chat(text, decoder) for text in texts]
            progress(f"Answering {len(prompts)} prompts, without and with the reward model")
            report = run(decoder, unguided, prompts, options.max_new_tokens, guidance, options.seed)
        if self.json:
            print_json(report.as_dict())
        else:
            show(report, console())


@dataclass(frozen=True)
class Answer:
    """One answer and its mean reward per token."""

    text: str
    tokens: int
    finish_reason: str
    mean_reward: float


@dataclass(frozen=True)
class Comparison:
    """One prompt answered without and with the reward model.

    Attributes:
        prompt: as text.
        unguided: the answer of the base model alone.
        guided: the answer with the reward model.
        marked: the guided answer with the changed tokens highlighted.
        changes: position, text and unguided text of each changed token.
        decisions: tokens that were chosen, the end-of-sequence token included.
    """

    prompt: str
    unguided: Answer
    guided: Answer
    marked: Text
    changes: list[tuple[int, str, str]]
    decisions: int


@dataclass(frozen=True)
class Report:
    """The comparison of all prompts, with the statistics of both runs."""

    comparisons: list[Comparison]
    unguided_stats: Any
    guided_stats: Any
    description: dict[str, Any]
    guidance: Guidance

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "models": self.description,
            "guidance": vars(self.guidance),
            "prompts": [
                {
                    "prompt": c.prompt,
                    "unguided": vars(c.unguided),
                    "guided": vars(c.guided),
                    "changed": [{"position": n, "token": new, "unguided": old} for n, new, old in c.changes],
                }
                for c in self.comparisons
            ],
            "unguided_stats": self.unguided_stats.as_dict(),
            "guided_stats": self.guided_stats.as_dict(),
        }


def run(
    decoder: "RewardGuidedDecoder",
    unguided: "RewardGuidedDecoder",
    prompts: list[Any],
    max_new_tokens: int,
    guidance: Guidance,
    seed: int,
) -> Report:
    """Answers prompts without and with the reward model, with the same noise, and scores both answers with it.

    Args:
        decoder: the decoder with the reward model.
        unguided: a decoder of the same model without a reward, whose speed is that of the model alone.
        prompts: texts or lists of chat messages.
        max_new_tokens: tokens of each answer at most.
        guidance: guidance of the guided run; the unguided run uses β = 0.
        seed: seed of both runs.

    Raises:
        RGTGError: a prompt does not fit, or the guidance is not possible with these models.
    """
    plain = Guidance(guidance.k, 0.0, guidance.temperature)
    # Warm up: the first call of each decoder starts threads and allocates memory.
    for each in (decoder, unguided):
        each.generate(
            prompts[0], max_new_tokens=2, guidance=guidance if each is decoder else plain, seed=seed
        )
    before = unguided.generate(prompts, max_new_tokens=max_new_tokens, guidance=plain, seed=seed)
    after = decoder.generate(prompts, max_new_tokens=max_new_tokens, guidance=guidance, seed=seed, trace=True)
    comparisons, decode = [], decode_with(decoder)
    plain_scores, guided_scores = (_scores(decoder, prompts, result) for result in (before, after))
    for i, prompt in enumerate(prompts):
        steps = after[i].trace or []
        comparisons.append(
            Comparison(
                prompt=prompt if isinstance(prompt, str) else prompt[-1]["content"],
                unguided=_answer(before[i], plain_scores[i]),
                guided=_answer(after[i], guided_scores[i]),
                marked=marked_answer(steps[: len(after[i].tokens)], decode),
                changes=[(s.position, s.text, _base_text(s, decode)) for s in steps if changed(s)],
                decisions=len(steps),
            )
        )
    return Report(comparisons, before.stats, after.stats, decoder.describe(), guidance)


def _scores(decoder: "RewardGuidedDecoder", prompts: list[Any], result: Any) -> list[list[float]]:
    """The reward of every token of every answer; an empty answer has none."""
    said = [i for i in range(len(prompts)) if result[i].tokens]
    scores: list[list[float]] = [[] for _ in prompts]
    if said:
        found = decoder.score([prompts[i] for i in said], [result[i].tokens for i in said])
        for i, rewards in zip(said, found, strict=True):
            scores[i] = rewards
    return scores


def _answer(row: Any, scores: list[float]) -> Answer:
    mean = fmean(scores) if scores else float("nan")
    return Answer(row.text, len(row.tokens), row.finish_reason, mean)


def _base_text(step: "Step", decode: Callable[[list[int]], str]) -> str:
    for candidate in step.candidates:
        if candidate.token == step.base_token:
            return candidate.text
    return decode([step.base_token])


def show(report: Report, console: Console) -> None:
    """Prints the answers side by side, rewards, changed tokens, speed and model calls."""
    for number, c in enumerate(report.comparisons, start=1):
        console.print()
        console.print(Text.assemble((f"{number}. ", "bold"), (c.prompt, "bold")))
        wide = console.width >= SIDE_BY_SIDE
        grid = Table.grid(expand=True, padding=(0, 1 if wide else 0))
        plain = _panel("unguided", Text(c.unguided.text), c.unguided, "dim")
        guided = _panel("guided", c.marked, c.guided, "green")
        if wide:
            grid.add_column(ratio=1)
            grid.add_column(ratio=1)
            grid.add_row(plain, guided)
        else:
            grid.add_column()
            grid.add_row(plain)
            grid.add_row(guided)
        console.print(grid)
        console.print(_changes(c))
    console.print()
    console.print(_summary(report))
    if not report.guided_stats.reward_calls:
        note = "The reward model runs in the base model's forward: it needs no calls of its own."
        console.print(Text(note, style="dim"))
    g = report.guidance
    console.print(
        Text(
            f"k={g.k} β={g.beta:g} temperature={g.temperature:g}; both runs use the same noise, so every "
            'marked token was changed by the reward model. Look closer with: rgtg-fast explain "your prompt"',
            style="dim",
        )
    )


def _panel(title: str, text: Text, answer: Answer, style: str) -> Panel:
    end = "" if answer.finish_reason != "length" else "…"
    body = Text.assemble(text, (end, "dim"))
    return Panel(
        body,
        title=f"[bold]{title}[/]",
        subtitle=f"mean reward {_mean([answer])} over {answer.tokens} tokens",
        border_style=style,
        height=None,
    )


def _changes(c: Comparison, limit: int = 8) -> Text:
    line = Text(f"The reward model changed {len(c.changes)} of {c.decisions} tokens", style="")
    if c.changes:
        line.append(": ")
        for n, (position, new, old) in enumerate(c.changes[:limit]):
            line.append(", " if n else "")
            line.append(f"#{position} ", style="dim")
            line.append(visible(old), style="strike dim")
            line.append(" → ", style="dim")
            line.append(visible(new), style="bold black on yellow")
        if len(c.changes) > limit:
            line.append(f" and {len(c.changes) - limit} more", style="dim")
    return line


def _mean(answers: list[Answer]) -> str:
    """The mean reward over the answers that are not empty."""
    rewards = [answer.mean_reward for answer in answers if answer.tokens]
    return f"{fmean(rewards):+.3f}" if rewards else "–"


def _summary(report: Report) -> Table:
    table = Table(header_style="bold")
    for name in ("", "mean reward", "tokens", "tokens/s", "base model calls", "reward calls"):
        table.add_column(name, justify="left" if not name else "right")
    for name, stats, answers in (
        ("unguided", report.unguided_stats, [c.unguided for c in report.comparisons]),
        ("guided", report.guided_stats, [c.guided for c in report.comparisons]),
    ):
        table.add_row(
            name,
            _mean(answers),
            str(stats.tokens),
            f"{stats.tokens_per_second:.1f}",
            f"{stats.lm_calls} ({stats.lm_tokens} tokens)",
            f"{stats.reward_calls} ({stats.reward_tokens} tokens)",
        )
    return table
