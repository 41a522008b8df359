"""`rgtg-fast train-policy`: trains a language model on preferences and prints its metrics."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.options import DATA, MODELS, OBJECTIVE, OUTPUT, STEPS, TRAINED, include, option
from rgtg_fast.cli.session import PAIRS_HELP, quiet
from rgtg_fast.cli.terminal import print_json, print_line, status
from rgtg_fast.cli.train import TrainingCommand, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(TrainingOptions):
    """Options for the fields of `PolicyTrainConfig`."""

    limit: int | None = option("Pairs or prompts to take at most.", None, DATA, shown="all")
    objective: str = option("dpo, simpo, treg, treg_simpo or rloo.", "dpo", OBJECTIVE)
    beta: float | None = option(
        "Weight of the preference loss; for rloo of the KL divergence.",
        None,
        OBJECTIVE,
        shown="0.1; simpo 2; rloo 0.05",
    )
    margin: float = option("SimPO's margin.", 1.0, OBJECTIVE)
    alpha: float = option("Weight of T-REG's regulariser.", 0.25, OBJECTIVE)
    samples: int = option("Answers to a prompt (rloo).", 4, OBJECTIVE)
    max_new_tokens: int = option("Tokens of an answer (rloo).", 64, OBJECTIVE)
    temperature: float = option("Temperature of the answers (rloo).", 1.0, OBJECTIVE)
    iterations: int = option("Steps on the same answers, with PPO's clipped ratio (rloo).", 1, OBJECTIVE)
    fork_layer: int = option("Train from this layer on.", 0, TRAINED)
    epochs: float = option("Passes over the data.", 1.0, STEPS)
    learning_rate: float = option("Learning rate.", 5e-5, STEPS, flags=("--lr",))
    batch_size: int = option(
        "Pairs (rloo: answers) of a forward.", 4, STEPS, flags=("--batch",), before="accumulation"
    )
    accumulation: int = option("Forwards of an optimizer step.", 4, STEPS, flags=("--accumulate",))


@dataclass(frozen=True, kw_only=True)
class TrainPolicy(TrainingCommand):
    """Train the language model itself on preferences: DPO, SimPO, T-REG or RLOO, by TRL."""

    data: str = option(f"{PAIRS_HELP}; for rloo rows with a prompt.", panel=DATA)
    output: Path = option("New folder for the policy.", panel=OUTPUT)
    model: str | None = option(
        "Language model to begin with, which is the reference: path or hub id.",
        None,
        MODELS,
        shown="the embedded SmolLM2-135M-Instruct",
    )
    config: PolicyOptions = include()
    reward: str | None = option(
        "What rloo maximises: path or hub id of a reward model or adapter, or `bundled:NAME`.",
        None,
        MODELS,
        before="device",
    )
    templates: Path | None = option(
        "YAML file with T-REG's contrastive prompts.",
        None,
        OBJECTIVE,
        shown="the project's own",
        before="samples",
    )
    token_cache: Path | None = option(
        "Folder for the reference's log-probabilities and token rewards, computed once.",
        None,
        OBJECTIVE,
        shown="in the user's cache folder",
        before="samples",
    )

    def run(self) -> None:
        """Trains the policy and prints the result."""
        quiet()
        # transformers, TRL and PEFT call deprecated functions of each other.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\..*")
        with status("Loading") as progress:
            from rgtg_fast.training.policy.launch import PolicyTrainConfig, train_policy
            from rgtg_fast.training.t_reg import Templates

            config = PolicyTrainConfig(**vars(self.config))
            templates = None if self.templates is None else Templates.load(self.templates)
            source = self.source(progress)
        result = train_policy(
            source,
            self.data,
            self.output,
            config,
            reward=self.reward,
            templates=templates,
            token_cache=self.token_cache or embedded.cache_folder() / "tokens",
            **self.arguments(),
        )
        if self.json:
            print_json({**asdict(result), "output": str(self.output), "recipe": asdict(config)})
            return
        metrics = result.metrics
        if "accuracy" in metrics:
            accuracy = f"{metrics['accuracy']:.3f}"
            print_line(f"held-out pairs whose chosen answer has the higher reward: {accuracy}")
        if "reward" in metrics:
            print_line(f"mean reward of the last answers: {metrics['reward']:.3f}")
        print_line(f"saved: {self.output}")
        print_line(
            f"try it: rgtg-fast generate --lm {self.output} --reward none 'How do I get better at chess?'"
        )
