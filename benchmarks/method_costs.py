"""What a token of every method costs, counted where tokens enter the models: `python -m benchmarks.method_costs`.

Each method of `rgtg-fast methods` decodes a few tokens with a reward model that has the base model's weights (the cost
of a step depends on shapes alone), and every forward is recorded independently of the package's own counters. Writes
results/method_costs.csv, from which `python -m benchmarks.report` makes the tables in docs/methods/README.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.harness import RESULTS, append, shown
from rgtg_fast import (
    AutoregressiveReward,
    BestOfN,
    Blocks,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RADReward,
    Reward,
    RewardGuidedDecoder,
    RGTGError,
    Segments,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.bench.models import clone_modules
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bundled import embedded
from rgtg_fast.config import Strategy
from rgtg_fast.methods import METHODS, Cost
from rgtg_fast.models.adapter import RECIPE, fingerprint
from rgtg_fast.models.layers import FusedLayers, TransformersLayers
from rgtg_fast.models.loading import ModelAndTokenizer, load_causal_lm
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.rewards.classifier import Classifier

OWN, SHARED = "a model of its own", "an adapter in the base model's forward"
OTHERS = {"contrastive": "the base model", "function": "a function", "text": f"{OWN}, over whole texts"}
STRATEGY, GATE = "strategy", "gate"
PROMPTS = ("How do I make tea?", "Why is the sky blue in the daytime?", "Tell me something about owls.")
MEASURED = ("lm_calls_per_step", "lm_tokens_per_token", "reward_calls_per_step", "reward_tokens_per_token")
COLUMNS = (
    "date",
    "rgtg_fast",
    "commit",
    "model",
    "dtype",
    "rows",
    "k",
    "tokens",
    "method",
    "guide",
    "settings",
    *MEASURED,
    *(f"table_{name}" for name in MEASURED),
)


@dataclass(frozen=True)
class Forward:
    """One forward of one model.

    Attributes:
        model: that ran it.
        kind: "step", "prefill" or "whole" (a text from its beginning, without a cache).
        tokens: of the input; for whole texts, the number of texts.
        adapted: tokens that ran once more, with an adapter.
    """

    model: object
    kind: str
    tokens: int
    adapted: int = 0


@contextmanager
def watched() -> Iterator[list[Forward]]:
    """Records every forward of every model, at its input."""
    seen: list[Forward] = []
    kinds = ["step"]
    prefill, uncached = ModelRunner._run_causal, ModelRunner.hidden_uncached
    classify = Classifier._forward

    def prefilled(self: ModelRunner, slot: int, start: int, tokens: torch.Tensor) -> torch.Tensor:
        kinds.append("prefill")
        try:
            return prefill(self, slot, start, tokens)
        finally:
            kinds.pop()

    def whole(self: ModelRunner, ids: Sequence[int], *variant: int) -> torch.Tensor:
        seen.append(Forward(self.layers, "whole", len(ids)))
        return uncached(self, ids, *variant)

    def noting(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(self: object, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            states = forward(self, ids, *rest)
            # Additional rows of the output are those of adapters.
            again = states.shape[0] * states.shape[1] - ids.numel()
            seen.append(Forward(self, kinds[-1], ids.numel(), again))
            return states

        return noted

    def texts(self: Classifier, rows: Sequence[Any]) -> torch.Tensor:
        seen.append(Forward(self.model, "whole", len(rows)))
        return classify(self, rows)

    with ExitStack() as stack:
        stack.enter_context(patch.object(ModelRunner, "_run_causal", prefilled))
        stack.enter_context(patch.object(ModelRunner, "hidden_uncached", whole))
        for kind in (FusedLayers, TransformersLayers):
            stack.enter_context(patch.object(kind, "forward", noting(kind.forward)))
        stack.enter_context(patch.object(Classifier, "_forward", texts))
        yield seen


@dataclass(frozen=True)
class Case:
    """One method in one form.

    Attributes:
        method: its name in the table.
        guide: the model whose forward computes the reward.
        cost: of a step, as in the table.
        reward: creates the reward.
        guidance: to decode with.
    """

    method: str
    guide: str
    cost: Cost
    reward: Callable[[], Reward | None]
    guidance: Guidance

    def __str__(self) -> str:
        return f"{self.method} ({self.guide})"


class Parts:
    """A base model and reward models that share its weights.

    Args:
        base: the language model.
        tokenizer: of the language model.
        folder: that adapters are written to.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path):
        self.base, self.tokenizer, self.folder = base, tokenizer, folder
        # No answer ends before the others: every row takes part in every step.
        base.generation_config.eos_token_id = None

    def scalar(self) -> ModelAndTokenizer:
        """A reward model: the base model's blocks under a random head of one label."""
        config = copy.deepcopy(self.base.config)
        config.num_labels, config.pad_token_id = 1, 0
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=self.base.dtype)
        model.model = clone_modules(self.base).base_model
        drawn = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(1))
        model.score = nn.Linear(config.hidden_size, 1, bias=False, dtype=self.base.dtype)
        model.score.weight = nn.Parameter((drawn / config.hidden_size**0.5).to(self.base.dtype))
        return model.eval(), self.tokenizer

    def causal(self) -> ModelAndTokenizer:
        """A language model with the base model's weights."""
        return clone_modules(self.base), self.tokenizer

    def adapter(self, name: str, head: bool) -> Path:
        """A folder with a random adapter of the upper half of the layers, and a reward head where wanted.

        Raises:
            RGTGError: PEFT is missing.
        """
        folder = self.folder / name
        if folder.exists():
            return folder
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise RGTGError('adapters are written by PEFT: pip install "rgtg-fast[bench]"') from error
        layers = self.base.config.num_hidden_layers
        settings = LoraConfig(
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
            r=4,
            init_lora_weights=False,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=list(range(layers // 2, layers)),
        )
        model, _ = self.scalar() if head else self.causal()
        get_peft_model(model, settings).save_pretrained(str(folder))
        (folder / RECIPE).write_text(json.dumps({"base_fingerprint": fingerprint(self.base)}))
        return folder


def cases(parts: Parts, k: int) -> list[Case]:
    """Every method with a reward model of its own and, where possible, an adapter in the base model's forward."""
    table = {method.name: method.cost for method in METHODS}
    scalar, combined = Guidance(k, 1.0), Guidance(k, 1.0, support="combined")

    def sequence(kind: type[SequenceReward]) -> Callable[[], Reward]:
        return lambda: kind(parts.scalar())

    def adapted(kind: type[SequenceReward]) -> Callable[[], Reward]:
        return lambda: kind(parts.adapter("scalar", True), share_trunk=True)

    def same(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        return torch.zeros(candidates.shape)

    classes = {"pargs": SequenceReward, "args": SequenceReward, "cd-fudge": SequenceReward, "rad": RADReward}
    own: dict[str, tuple[Callable[[], Reward], Guidance]] = {
        **{name: (sequence(kind), scalar) for name, kind in classes.items()},
        "farma": (lambda: VocabularyReward(parts.causal()), combined),
        "genarm": (lambda: AutoregressiveReward(parts.causal()), replace(combined, support="all")),
        "eft": (lambda: LogRatioReward(parts.causal(), parts.causal()), combined),
        "contrastive": (ContrastiveReward, combined),
        "text": (lambda: TextReward(parts.scalar(), batch_size=10_000), scalar),
        "function": (lambda: FunctionReward(same), scalar),
    }
    lora: dict[str, tuple[Callable[[], Reward], Guidance]] = {
        **{name: (adapted(kind), scalar) for name, kind in classes.items()},
        "farma": (lambda: VocabularyReward(parts.adapter("causal", False), share_trunk=True), combined),
        "genarm": (lambda: AutoregressiveReward(parts.adapter("causal", False), share_trunk=True), combined),
        "eft": (
            lambda: LogRatioReward(parts.adapter("causal", False), parts.adapter("other", False)),
            combined,
        ),
    }
    found = [Case("unguided", "–", Cost(reward_calls=0), lambda: None, Guidance(k, 0.0))]
    for name, (reward, guidance) in own.items():
        cost = table[name]
        assert cost is not None
        found.append(Case(name, OTHERS.get(name, OWN), cost, reward, guidance))
    # The sum of both: two contexts in the base model's batch for one, the candidates for the other.
    both = lambda: MixtureReward([ContrastiveReward(), SequenceReward(parts.scalar())], [0.5, 0.5])  # noqa: E731
    cost = Cost(lm_rows=3, reward_candidates=1)
    found.append(Case("mixture of contrastive and pargs", OWN, cost, both, scalar))
    for name, (reward, guidance) in lora.items():
        cost = table[name]
        assert cost is not None
        found.append(Case(name, SHARED, cost.shared(), reward, guidance))
    return found


def measure(case: Case, parts: Parts, new_tokens: int, engine: str = "auto") -> dict[str, Any]:
    """Decodes with one method and counts what enters the models.

    Args:
        case: the method.
        parts: the models.
        new_tokens: steps.
        engine: of the decoder.

    Returns:
        A row of the results file without its origin.

    Raises:
        RGTGError: the package's own counters disagree.
    """
    called: list[int] = []
    base = (clone_modules(parts.base), parts.tokenizer)
    decoder = RewardGuidedDecoder.from_pretrained(base, reward=case.reward(), engine=engine)
    if isinstance(decoder.reward, FunctionReward):
        decoder.reward.function = _counted(decoder.reward.function, called)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    with watched() as seen:
        stats = decoder.generate(prompts, new_tokens, case.guidance).stats
    steps = [forward for forward in seen if forward.kind != "prefill"]
    lm = [forward for forward in steps if forward.model is decoder.lm.runner.layers]
    others = [forward for forward in steps if forward.model is not decoder.lm.runner.layers]
    guided = sum(called) + sum(f.tokens for f in others) + sum(f.adapted for f in lm)
    found = (len(lm), sum(f.tokens for f in lm), len(others) + len(called), guided)
    if not called and not case.cost.whole_texts:
        counters = (stats.lm_calls, stats.lm_tokens, stats.reward_calls, stats.reward_tokens)
        if found != counters:
            raise RGTGError(f"{case}: {found} forwards and tokens were seen and the counters say {counters}")
    rows, k, cost = len(prompts), case.guidance.k, case.cost
    return {
        "rows": rows,
        "k": k,
        "tokens": stats.tokens,
        "method": case.method,
        "guide": case.guide,
        "settings": f"support={case.guidance.support}",
        "lm_calls_per_step": found[0] / stats.steps,
        "lm_tokens_per_token": found[1] / stats.tokens,
        "reward_calls_per_step": found[2] / stats.steps,
        "reward_tokens_per_token": found[3] / stats.tokens,
        "table_lm_calls_per_step": float(cost.lm_calls),
        "table_lm_tokens_per_token": cost.lm_tokens(rows, k) / rows,
        "table_reward_calls_per_step": float(cost.reward_calls),
        "table_reward_tokens_per_token": cost.reward_tokens(rows, k) / rows,
    }


def _counted(function: Callable[..., torch.Tensor], called: list[int]) -> Callable[..., torch.Tensor]:
    def noted(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        called.append(candidates.numel())
        return function(prefix_ids, candidates)

    return noted


def strategies(parts: Parts) -> dict[str, Strategy]:
    """Every strategy by name, with settings that are short enough to measure."""
    decoder = RewardGuidedDecoder.from_pretrained(parts.causal(), reward=SequenceReward(parts.scalar()))
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    rows = decoder.generate(chats, 16, Guidance(50, 0.0))
    usual = sum(row.reward or 0.0 for row in rows) / len(rows)
    return {
        "best_of_n": BestOfN(n=4),
        "blockwise": Blocks(k=4, length=4),
        # The rewards of an untrained model are arbitrary: about half of the usual ones are above this target.
        "segment": Segments(target=usual, beta=0.1, min_tokens=2, max_tokens=4),
    }


def measure_strategy(name: str, strategy: Strategy, parts: Parts, new_tokens: int) -> dict[str, Any]:
    """Decodes by one strategy and counts what enters the models.

    Prompts do not count, except for the reward model of best-of-n, which reads them with each answer.

    Returns:
        A row of the results file without its origin and without the table's values.

    Raises:
        RGTGError: the package's own counters disagree.
    """
    decoder = RewardGuidedDecoder.from_pretrained(
        parts.causal(), reward=SequenceReward(parts.scalar()), max_batch=4 * len(PROMPTS)
    )
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    with watched() as seen:
        result = decoder.generate(chats, new_tokens, strategy=strategy)
    stats = result.stats
    decided = sum(len(row.tokens) + (row.finish_reason == "eos") for row in result)
    of_lm = sum(f.tokens for f in seen if f.model is decoder.lm.runner.layers) - stats.prompt_tokens_lm
    of_reward = sum(f.tokens for f in seen if f.model is not decoder.lm.runner.layers)
    prompts = 0 if name == "best_of_n" else stats.prompt_tokens_reward
    counters = (stats.lm_tokens, stats.reward_tokens + stats.prompt_tokens_reward - prompts)
    if (of_lm, of_reward - prompts) != counters:
        raise RGTGError(
            f"{name}: {of_lm, of_reward - prompts} tokens were seen and the counters say {counters}"
        )
    return {
        "rows": len(PROMPTS),
        "tokens": decided,
        "method": name,
        "guide": STRATEGY,
        "settings": str(strategy),
        "lm_calls_per_step": stats.lm_calls / new_tokens,
        "lm_tokens_per_token": of_lm / decided,
        "reward_calls_per_step": stats.reward_calls / new_tokens,
        "reward_tokens_per_token": (of_reward - prompts) / decided,
    }


def measure_gate(parts: Parts, k: int, new_tokens: int) -> dict[str, Any]:
    """Decodes with sparse guidance, one row, with a threshold that guides about half of the tokens.

    Returns:
        As `measure_strategy`.

    Raises:
        RGTGError: the package's own counters disagree.
    """
    decoder = RewardGuidedDecoder.from_pretrained(parts.causal(), reward=SequenceReward(parts.scalar()))
    chat = [{"role": "user", "content": PROMPTS[0]}]
    plain = decoder.generate(chat, new_tokens, Guidance(k, 0.0), trace=True)[0]
    gate = median(step.entropy for step in plain.trace or [])
    with watched() as seen:
        stats = decoder.generate(chat, new_tokens, Guidance(k, 1.0, gate_entropy=gate)).stats
    of_lm = [f for f in seen if f.model is decoder.lm.runner.layers and f.kind == "step"]
    of_reward = (
        sum(f.tokens for f in seen if f.model is not decoder.lm.runner.layers) - stats.prompt_tokens_reward
    )
    counters = (stats.lm_calls, stats.lm_tokens, stats.reward_tokens)
    if (len(of_lm), sum(f.tokens for f in of_lm), of_reward) != counters:
        raise RGTGError(
            f"gate: {len(of_lm), of_reward} forwards and tokens were seen, the counters say {counters}"
        )
    share = stats.guided_tokens / stats.tokens
    return {
        "rows": 1,
        "k": k,
        "tokens": stats.tokens,
        "method": GATE,
        "guide": STRATEGY,
        "settings": f"gate(k={k}, gate_entropy={gate:.3f}, guided={share:.3f})",
        "lm_calls_per_step": stats.lm_calls / stats.steps,
        "lm_tokens_per_token": stats.lm_tokens / stats.tokens,
        "reward_calls_per_step": stats.reward_calls / stats.steps,
        "reward_tokens_per_token": of_reward / stats.tokens,
    }


def differs(row: dict[str, Any]) -> list[str]:
    """The columns in which a measured row differs from the table of methods."""
    return [name for name in MEASURED if f"table_{name}" in row and row[name] != row[f"table_{name}"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Counts what a token of every method costs.")
    parser.add_argument("--lm", help="base model, a Llama (default: the embedded SmolLM2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS / "method_costs.csv")
    given = parser.parse_args(arguments)
    try:
        path = given.lm or str(embedded.default_model(print))
        model, tokenizer = load_causal_lm(path, "cpu", given.dtype)
        if tokenizer is None:
            raise RGTGError(f"{path} came without a tokenizer: name a folder with one")
        origin = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            **{name: value for name, value in machine().items() if name in COLUMNS},
            "model": given.lm or embedded.NAME,
            "dtype": given.dtype,
        }
        with tempfile.TemporaryDirectory() as folder:
            parts = Parts(model, tokenizer, Path(folder))
            rows = []
            for case in cases(parts, given.k):
                rows.append(origin | measure(case, parts, given.new_tokens))
                print(case, *(f"{rows[-1][name]:g}" for name in MEASURED), *differs(rows[-1]))
            for name, strategy in strategies(parts).items():
                rows.append(origin | measure_strategy(name, strategy, parts, 4 * given.new_tokens))
                print(strategy, *(f"{rows[-1][name]:g}" for name in MEASURED))
            rows.append(origin | measure_gate(parts, given.k, 4 * given.new_tokens))
            print(rows[-1]["settings"], *(f"{rows[-1][name]:g}" for name in MEASURED))
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    given.output.unlink(missing_ok=True)
    append(given.output, [{name: shown(row.get(name)) for name in COLUMNS} for row in rows], COLUMNS)
    print(f"{len(rows)} rows: {given.output}")
    return 1 if any(map(differs, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
