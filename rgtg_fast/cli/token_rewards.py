"""`rgtg-fast token-rewards`: T-REG's reward of each token of an answer, in numbers and colours."""

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from rgtg_fast.cli.explain import added_texts, visible
from rgtg_fast.cli.session import Setup
from rgtg_fast.cli.terminal import status
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.study.page import escape

# Colours of the terminal at the ends of the scale: worse and better.
_WORSE, _BETTER = (200, 60, 50), (40, 140, 80)


@dataclass(frozen=True)
class TokenReward:
    """One token of an answer.

    Attributes:
        token: its id. text: what it adds to the answer. reward: r̂ in [−½, ½].
    """

    token: int
    text: str
    reward: float


def compute(setup: Setup, prompt: str, answer: str, templates: Path | None) -> list[TokenReward]:
    """T-REG's reward of every token of an answer and of the end of sequence after it.

    Args:
        setup: names the language model.
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


def report(prompt: str, answer: str, model: str, tokens: list[TokenReward]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "prompt": prompt,
        "answer": answer,
        "lm": model,
        "mean_reward": sum(token.reward for token in tokens) / len(tokens),
        "tokens": [asdict(token) for token in tokens],
    }


def _strength(tokens: list[TokenReward]) -> float:
    """The reward that gets the full colour."""
    return max(max(abs(token.reward) for token in tokens), 1e-9)


def coloured(tokens: list[TokenReward]) -> RenderableType:
    """The answer with a colour behind every token, and the tokens with the largest and smallest rewards."""
    top = _strength(tokens)
    text = Text()
    for token in tokens:
        share = abs(token.reward) / top
        end = _BETTER if token.reward > 0 else _WORSE
        colour = ",".join(str(round(c * share)) for c in end)
        text.append(token.text, style=f"white on rgb({colour})" if share > 0.05 else "")
    ranked = sorted(tokens, key=lambda token: token.reward)
    lines = [Text(""), Text(_line(tokens), "dim")]
    for name, some in (("better", ranked[::-1][:5]), ("worse", ranked[:5])):
        named = ", ".join(f"{visible(token.text)} {token.reward:+.3f}" for token in some)
        lines.append(Text(f"{name}: {named}", "dim"))
    return Group(text, *lines)


def _line(tokens: list[TokenReward]) -> str:
    mean = sum(token.reward for token in tokens) / len(tokens)
    above = sum(token.reward > 0 for token in tokens)
    return f"mean reward {mean:+.4f}; {above} of {len(tokens)} tokens above 0; full colour at ±{_strength(tokens):.3f}"


def page(prompt: str, tokens: list[TokenReward], facts: dict[str, str]) -> str:
    """A self-contained HTML page: the answer as a heat map of its token rewards.

    Args:
        facts: what to show under the title; name to value.
    """
    style = files("rgtg_fast.app").joinpath("explain.css").read_text(encoding="utf-8")
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
    about = " · ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token rewards: {escape(prompt[:60])}</title>
<style>
{style}</style>
</head>
<body>
<h1>What every token is worth</h1>
<p class="sub">{about}</p>
<h2>Prompt</h2>
<div class="box">{escape(prompt)}</div>
<h2>Answer</h2>
<div class="box answer">{answer}</div>
<p class="key">Green tokens are more probable when the model is asked to make the answer better than when it is asked to
make it worse, red ones less. {escape(_line(tokens))}.</p>
<h2>Tokens, the strongest first</h2>
<section><table><thead><tr><th>token</th><th>reward</th></tr></thead><tbody>{rows}</tbody></table></section>
</body>
</html>
"""
