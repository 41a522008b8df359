"""`rgtg-fast token-rewards`: T-REG's reward of each token of an answer, in numbers and colors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from rgtg_fast.cli.explain import added_texts, html_page, visible
from rgtg_fast.cli.options import argument, include, json_option
from rgtg_fast.cli.session import Setup
from rgtg_fast.cli.terminal import console, note, print_json, read_stdin, status
from rgtg_fast.config import OUTPUT, option
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.study.page import escape
from rgtg_fast.files import check_writable, write_text

# Colors of the terminal at the ends of the scale: worse and better.
_WORSE, _BETTER = (200, 60, 50), (40, 140, 80)


@dataclass(frozen=True, kw_only=True)
class TokenRewards:
    """Show T-REG's reward of every token of an answer, from its contrastive prompts."""

    prompt: str = argument("The question, or a dialogue in HH-RLHF's turns.")
    answer: str = argument("The answer to judge; `-` reads it from stdin.")
    templates: Path | None = option(
        "YAML file with the contrastive prompts.", None, shown="the project's own"
    )
    html: Path | None = option("Write a self-contained HTML page here.", None, OUTPUT)
    json: bool = json_option()
    setup: Setup = include("lm dtype device")

    def run(self) -> None:
        """Computes the rewards and prints them."""
        if self.html is not None:
            check_writable(self.html, self.templates)
        text = read_stdin() if self.answer == "-" else self.answer
        tokens = compute(self.setup, self.prompt, text, self.templates)
        model = self.setup.names()["lm"]
        if self.html is not None:
            templates = "the project's own" if self.templates is None else self.templates.name
            write_text(self.html, page(self.prompt, tokens, {"model": model, "templates": templates}))
        if self.json:
            report = {"prompt": self.prompt, "answer": text, "lm": model, "mean_reward": _mean(tokens)}
            print_json({**report, "tokens": [asdict(token) for token in tokens]})
            return
        console().print(colored(tokens))
        if self.html is not None:
            note(f"written: {self.html}")


@dataclass(frozen=True)
class TokenReward:
    """One token of an answer.

    Attributes:
        token: its id.
        text: what it adds to the answer.
        reward: r̂ in [−½, ½].
    """

    token: int
    text: str
    reward: float


def compute(setup: Setup, prompt: str, answer: str, templates: Path | None) -> list[TokenReward]:
    """T-REG's reward of every token of an answer and of the end of sequence after it.

    Args:
        setup: the language model.
        prompt: a question, or a dialogue in HH-RLHF's turns.
        templates: file of the contrastive prompts, by default the project's own.

    Raises:
        RGTGError: an empty prompt or answer, templates that cannot be used, or a text over the model's context.
    """
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not text.strip():
            raise RGTGError(f"the {name} is empty: give a text")
    with status("Loading") as progress:
        from rgtg_fast.training.data import hh_messages
        from rgtg_fast.training.packing import use_packed_attention
        from rgtg_fast.training.t_reg import Templates, token_rewards

        texts = Templates.load() if templates is None else Templates.load(templates)
        model, tokenizer = setup.pair(progress)
    assert tokenizer is not None
    use_packed_attention(model)
    answer = answer.strip()
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    rewards = token_rewards(model, tokenizer, [hh_messages(prompt) or prompt], [answer], [ids], texts)[0]
    pieces = added_texts(ids, lambda tokens: str(tokenizer.decode(tokens)))
    return [TokenReward(*row) for row in zip(ids, pieces, rewards.tolist(), strict=True)]


def _mean(tokens: list[TokenReward]) -> float:
    return sum(token.reward for token in tokens) / len(tokens)


def _strength(tokens: list[TokenReward]) -> float:
    """The largest absolute reward, which gets the full color."""
    return max(max(abs(token.reward) for token in tokens), 1e-9)


def colored(tokens: list[TokenReward]) -> RenderableType:
    """The answer with colored tokens, and the tokens with the largest and smallest rewards."""
    top = _strength(tokens)
    text = Text()
    for token in tokens:
        share = abs(token.reward) / top
        end = _BETTER if token.reward > 0 else _WORSE
        color = ",".join(str(round(c * share)) for c in end)
        text.append(token.text, style=f"white on rgb({color})" if share > 0.05 else "")
    ranked = sorted(tokens, key=lambda token: token.reward)
    lines = [Text(""), Text(_line(tokens), "dim")]
    for name, some in (("better", ranked[::-1][:5]), ("worse", ranked[:5])):
        named = ", ".join(f"{visible(token.text)} {token.reward:+.3f}" for token in some)
        lines.append(Text(f"{name}: {named}", "dim"))
    return Group(text, *lines)


def _line(tokens: list[TokenReward]) -> str:
    mean = _mean(tokens)
    above = sum(token.reward > 0 for token in tokens)
    return f"mean reward {mean:+.4f}; {above} of {len(tokens)} tokens above 0; full color at ±{_strength(tokens):.3f}"


def page(prompt: str, tokens: list[TokenReward], facts: Mapping[str, str]) -> str:
    """A self-contained HTML page: the answer as a heat map of its token rewards.

    Args:
        facts: what to show under the title; name to value.
    """
    top = _strength(tokens)
    answer = "".join(
        f'<span style="background:color-mix(in srgb, var(--{"pick" if token.reward > 0 else "low"}) '
        f'{100 * abs(token.reward) / top * 0.75:.0f}%, transparent)" title="{escape(visible(token.text))} '
        f'{token.reward:+.4f}">{escape(token.text)}</span>'
        for token in tokens
    )
    rows = "".join(
        f"<tr><td><code>{escape(visible(token.text))}</code></td>"
        f'<td class="{"good" if token.reward > 0 else "bad"}">{token.reward:+.4f}</td></tr>'
        for token in sorted(tokens, key=lambda token: -abs(token.reward))
    )
    rest = f"""<p class="key">Green tokens are more probable when the model is asked to make the answer better than when
it is asked to make it worse, red ones less. {escape(_line(tokens))}.</p>
<h2>Tokens, the strongest first</h2>
<section><table><thead><tr><th>token</th><th>reward</th></tr></thead><tbody>{rows}</tbody></table></section>"""
    return html_page("Token rewards", "What every token is worth", prompt, answer, rest, facts)
