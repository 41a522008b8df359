"""One call from preference pairs to a trained policy: DPO, SimPO, T-REG and RLOO by TRL's trainers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import fingerprint
from rgtg_fast.models.loading import context_length, resolve_device
from rgtg_fast.training.activation_cache import hash_pairs
from rgtg_fast.training.answer_scores import AnswerFile, fill_reference
from rgtg_fast.training.data import check_answers_ended
from rgtg_fast.training.model import (
    Lora,
    check_fork_layer,
    freeze_below,
    lora_config,
    merge,
    trained_parameters,
)
from rgtg_fast.training.packing import use_packed_attention
from rgtg_fast.training.policy.data import PolicyData, load_preferences, load_prompts
from rgtg_fast.training.policy.reward import RewardFunction, reward_function
from rgtg_fast.training.run import (
    LOG_FILE,
    RECIPE_FILE,
    Progress,
    TrainingLog,
    begin,
    check_recipe,
    check_reports,
    check_steps,
    checkpointing,
    no_progress,
    one_run,
    write_json,
)
from rgtg_fast.training.t_reg import Templates, fill_token_rewards
from rgtg_fast.training.vocabulary import load_causal

EXTRA = 'pip install "rgtg-fast[policy]"'


@dataclass(frozen=True)
class _Kind:
    """What distinguishes an objective.

    Attributes:
        beta: by default. form: "dpo" or "simpo", None for policy gradients. token_rewards: has them.
    """

    beta: float
    form: str | None
    token_rewards: bool = False


POLICY_OBJECTIVES = {
    "dpo": _Kind(0.1, "dpo"),
    "simpo": _Kind(2.0, "simpo"),
    "treg": _Kind(0.1, "dpo", token_rewards=True),
    "treg_simpo": _Kind(2.0, "simpo", token_rewards=True),
    "rloo": _Kind(0.05, None),
}


# Pairs of a forward; transformers counts through all of a batch, whether they are there or not.
MAX_BATCH = 2**20


@dataclass(frozen=True)
class PolicyTrainConfig:
    """Everything that decides what a policy learns.

    Attributes:
        objective: one of `POLICY_OBJECTIVES`.
        beta: β of the preference loss, for rloo the weight of the KL divergence to the reference; None for 0.1 (dpo,
            treg), 2 (simpo, treg_simpo) or 0.05 (rloo).
        margin: γ of simpo and treg_simpo.
        alpha: α, the weight of T-REG's regulariser.
        fork_layer: layers below it are frozen; 0 trains all of them.
        full: train the weights themselves instead of LoRA adapters.
        lora_rank, lora_alpha, lora_dropout: see `Lora`.
        epochs: passes over the pairs or prompts.
        learning_rate: at its height; it warms up over `warmup` of the steps and falls along a cosine to 0.
        weight_decay: of all but biases and norms.
        batch_size: pairs (rloo: answers) of a forward. accumulation: forwards of an optimizer step on one process.
        answers_ended: as in `Recipe`; answers that were cut have no end token to be learned (not rloo).
        max_length: tokens of a prompt and its longer answer. min_answer_tokens: shorter answers are dropped.
        held_out: share of the pairs, by prompt, to evaluate on where no evaluation data are named (not rloo).
        limit: pairs or prompts to take at most, from the beginning of the data.
        samples: answers to each prompt that rloo compares. max_new_tokens, temperature: of these answers.
        iterations: optimizer steps on the same answers, with PPO's clipped ratio (rloo).
        bf16: compute in bfloat16; trained weights stay float32.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        seed: of the order, the initial adapters and the samples.
    """

    objective: str = "dpo"
    beta: float | None = None
    margin: float = 1.0
    alpha: float = 0.25
    fork_layer: int = 0
    full: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    epochs: float = 1.0
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup: float = 0.1
    batch_size: int = 4
    accumulation: int = 4
    answers_ended: str = "auto"
    max_length: int = 512
    min_answer_tokens: int = 0
    held_out: float = 0.1
    limit: int | None = None
    samples: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    iterations: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective == "ppo":
            raise RGTGError(
                "objective='ppo': TRL has no PPO trainer since version 1.13; use 'rloo', PPO's clipped ratio with the "
                "other answers' mean reward in the place of a value model"
            )
        if self.objective not in POLICY_OBJECTIVES:
            raise RGTGError(
                f"objective={self.objective!r} is unknown: use one of {', '.join(POLICY_OBJECTIVES)}"
            )
        check_answers_ended(self.answers_ended)
        Lora(self.lora_rank, self.lora_alpha, self.lora_dropout)
        counts = {"batch_size": 1, "accumulation": 1, "max_new_tokens": 1, "iterations": 1, "samples": 1}
        counts |= {"max_length": 2, "min_answer_tokens": 0, "limit": 1}
        above = ("epochs", "learning_rate", "lora_alpha", "temperature")
        check_recipe(self, counts, above, ("beta", "alpha", "margin", "weight_decay"))
        if self.batch_size > MAX_BATCH:
            raise RGTGError(f"batch_size={self.batch_size} is above {MAX_BATCH}: use accumulation for more")
        if self.beta == 0 and self.objective != "rloo":
            raise RGTGError(f"beta=0 leaves {self.objective} no preference to learn: use for example 0.1")
        if self.objective == "rloo" and self.samples < 2:
            raise RGTGError(f"samples={self.samples} leaves rloo nothing to compare with: use at least 2")
        if self.objective == "rloo" and self.batch_size * self.accumulation % self.samples:
            raise RGTGError(
                f"batch_size={self.batch_size} times accumulation={self.accumulation} is no multiple of "
                f"samples={self.samples}: the answers to a prompt belong into one step"
            )

    @property
    def kind(self) -> _Kind:
        """What distinguishes the objective."""
        return POLICY_OBJECTIVES[self.objective]

    @property
    def weight(self) -> float:
        """β."""
        return self.kind.beta if self.beta is None else self.beta


@dataclass(frozen=True)
class PolicyResult:
    """What a training run came to.

    Attributes:
        output: the saved folder.
        steps: optimizer steps. trained: parameters that were trained.
        seconds: of the training proper.
        data: counts of the data.
        metrics: of the evaluation after training, without the prefix `eval_`; for rloo the last logged reward and KL.
    """

    output: Path
    steps: int
    trained: int
    seconds: float
    data: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)


@one_run
def train_policy(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    recipe: PolicyTrainConfig | None = None,
    *,
    eval_data: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None,
    reward: str | os.PathLike[str] | RewardFunction | None = None,
    templates: Templates | None = None,
    token_cache: str | os.PathLike[str] | None = None,
    resume: bool = False,
    merged: str | os.PathLike[str] | None = None,
    save_steps: int = 50,
    logging_steps: int = 10,
    report_to: str | Sequence[str] = "none",
    callbacks: Sequence[TrainerCallback] = (),
    device: str | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> PolicyResult:
    """Trains a language model on preferences with TRL and saves it as transformers and PEFT do.

    The output folder is a PEFT adapter (or, with `full`, a model); `RewardGuidedDecoder.from_pretrained(folder, ...)`
    and `AutoModelForCausalLM.from_pretrained(folder)` load it. Beside it lie the tokenizer, the recipe and what it was
    used on (`rgtg_fast.json`), and the log (`training_log.jsonl`).

    Args:
        model: folder or hub id of a causal language model, the policy's beginning and its reference.
        data, eval_data: pairs as in `load_pairs`; without `eval_data`, `recipe.held_out` of them is split off by
            prompt. For rloo, rows with a `prompt`.
        output: new folder, or that of a run to resume.
        recipe: what to learn and how; single fields may be passed by name as well.
        reward: what rloo maximises: folder or hub id of a reward model or adapter, `bundled:NAME`, or a function as
            TRL calls it, f(prompts, completions, completion_ids, **columns) -> rewards.
        templates: of T-REG's contrastive prompts, by default the project's own.
        token_cache: folder for the reference's log-probabilities and token rewards, by default inside `output`; several
            runs may share one.
        resume: go on from the last complete checkpoint in `output`.
        merged: also write a whole model with the adapters merged here.
        save_steps, logging_steps: optimizer steps between checkpoints and lines of the log.
        report_to, callbacks: transformers' integrations and callbacks.
        device: "cpu" or "cuda"; None for CUDA where there is one.
        say: receives lines about the progress.

    Raises:
        RGTGError: one line for everything that a user can get wrong, a loss that is not finite, and a full disk.

    Example:
        >>> result = train_policy("folder-of-a-model", "pairs.jsonl", "policy", objective="treg")  # doctest: +SKIP
    """
    recipe = replace(recipe or PolicyTrainConfig(), **_known(settings))
    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise RGTGError(f"training a policy needs {' and '.join(missing)}: {EXTRA}")
    if (reward is not None) != (recipe.objective == "rloo"):
        raise RGTGError(
            "rloo needs a reward to maximise: name a reward model"
            if reward is None
            else f"{recipe.objective} learns from pairs and takes no reward: leave it out, or use objective='rloo'"
        )
    if templates is not None and not recipe.kind.token_rewards:
        raise RGTGError(
            f"{recipe.objective} has no token rewards: leave out the templates, or use objective='treg'"
        )
    check_steps(save_steps=save_steps, logging_steps=logging_steps)
    check_reports(report_to)
    folder = Path(output)
    args = _arguments(recipe, folder, save_steps, logging_steps, report_to, device)
    # With several processes, one of them speaks and prepares the folder.
    main = args.process_index == 0
    if not main:
        progress = no_progress
    if merged is not None and (recipe.full or Path(merged).exists()):
        raise RGTGError(
            "a full model has no adapters to merge: leave out the merged folder"
            if recipe.full
            else f"{merged} exists: name another folder for the merged model"
        )
    set_seed(recipe.seed)
    half = recipe.bf16 and not recipe.full
    network, tokenizer = load_causal(model, torch.bfloat16 if half else torch.float32)
    _check_room(network, recipe)
    base = fingerprint(network)
    found = (
        load_prompts(data, recipe, tokenizer)
        if recipe.kind.form is None
        else load_preferences(data, eval_data, recipe, tokenizer)
    )
    for line in found.lines:
        progress(line)
    if recipe.kind.token_rewards and templates is None:
        templates = Templates.load()
    facts = {
        # All of this must be the same where a run is resumed.
        "recipe": asdict(recipe)
        | {
            "templates": None if templates is None else templates.digest,
            "reward": "a function" if callable(reward) else reward and str(reward),
        },
        "base_model": str(model),
        "base_fingerprint": base,
        "data_sha256": hash_pairs(found.train),
        "eval_data_sha256": hash_pairs(found.evaluation) if found.evaluation else None,
        "data": found.report,
        "templates": None if templates is None else asdict(templates),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": importlib.metadata.version("trl"),
        },
    }
    with args.main_process_first(desc="the output folder"):
        if main:
            begin(folder, facts, resume)
    checkpoint = get_last_checkpoint(str(folder)) if resume else None
    log = TrainingLog(folder / LOG_FILE, progress)
    lora = Lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout)
    peft_config = None if recipe.full else lora_config(network, recipe.fork_layer, lora, None)
    shared: dict[str, Any] = {
        "processing_class": tokenizer,
        "peft_config": peft_config,
        "callbacks": [log, *callbacks],
    }
    if recipe.full:
        freeze_below(network, recipe.fork_layer)
    if recipe.kind.form is None:
        from rgtg_fast.training.policy.trainer import PolicyGradientTrainer

        assert reward is not None
        given = reward if callable(reward) else reward_function(reward, network, tokenizer)
        trainer: Any = PolicyGradientTrainer(
            network, reward_funcs=given, args=args, train_dataset=_prompt_dataset(found), **shared
        )
    else:
        cache = token_cache or folder / "tokens"
        trainer = _preference_trainer(recipe, network, args, found, cache, templates, progress, shared)
    for console in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(console)
    trained = sum(p.numel() for _, p in trained_parameters(trainer.model))
    what = "prompts" if recipe.kind.form is None else "pairs"
    start = f"from {checkpoint}" if checkpoint else "from the start"
    progress(f"training {trained:,} parameters on {len(found.train):,} {what}, {start}")
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if found.evaluation else _last(trainer.state.log_history, ("reward", "kl"))
    trainer.save_to(folder)
    outcome = PolicyResult(
        folder,
        trainer.state.global_step,
        trained,
        log.seconds,
        found.report,
        {name.removeprefix("eval_"): value for name, value in metrics.items()},
    )
    if main:
        write_json(folder / RECIPE_FILE, facts | {"steps": outcome.steps, "metrics": outcome.metrics})
        if merged is not None:
            merge(folder, merged)
    return outcome


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(PolicyTrainConfig)]
    unknown = next((name for name in settings if name not in names), None)
    if unknown is not None:
        raise RGTGError(f"there is no setting {unknown!r}: use one of {', '.join(names)}")
    return settings


def _check_room(network: PreTrainedModel, recipe: PolicyTrainConfig) -> None:
    check_fork_layer(network, recipe.fork_layer)
    layers = network.config.get_text_config().num_hidden_layers
    if recipe.fork_layer == layers and not recipe.full:
        raise RGTGError(f"fork_layer={layers} leaves no layer to adapt: use at most {layers - 1}")
    limit = context_length(network)
    if recipe.max_length > limit:
        raise RGTGError(f"max_length={recipe.max_length} exceeds the model's context: use at most {limit}")
    if recipe.kind.form is None and recipe.max_new_tokens >= recipe.max_length:
        raise RGTGError(
            f"max_new_tokens={recipe.max_new_tokens} leaves no room for a prompt: use at most {recipe.max_length - 1}"
        )


def _prompt_dataset(found: PolicyData) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": found.sources[0][pair.index].prompt, "row": pair.index} for pair in found.train]
    )


def _preference_trainer(
    recipe: PolicyTrainConfig,
    network: PreTrainedModel,
    args: Any,
    found: PolicyData,
    cache: str | os.PathLike[str],
    templates: Templates | None,
    progress: Progress,
    shared: dict[str, Any],
) -> Any:
    from rgtg_fast.training.policy.trainer import TRegTrainer, preference_dataset

    kind, tokenizer = recipe.kind, shared["processing_class"]
    pairs = [*found.train, *found.evaluation]
    sources = [
        texts[pair.index]
        for part, texts in zip((found.train, found.evaluation), found.sources, strict=True)
        for pair in part
    ]
    reference: AnswerFile | None = None
    rewards: AnswerFile | None = None
    attention = str(network.config._attn_implementation)
    use_packed_attention(network)
    network.to(args.device)  # pyright: ignore[reportArgumentType]
    with args.main_process_first(desc="the reference's numbers"):
        if kind.form == "dpo":
            reference = fill_reference(cache, network, pairs, autocast=args.bf16, progress=progress)
        if kind.token_rewards:
            assert templates is not None
            rewards = fill_token_rewards(
                cache,
                network,
                tokenizer,
                pairs,
                sources,
                templates,
                autocast=args.bf16,
                progress=progress,
            )
    network.set_attn_implementation(attention)
    evaluation = preference_dataset(found.evaluation, reference, rewards, len(found.train))
    return TRegTrainer(
        network,
        args,
        preference_dataset(found.train, reference, rewards),
        evaluation if found.evaluation else None,
        alpha=recipe.alpha if kind.token_rewards else 0.0,
        form=str(kind.form),
        margin=recipe.margin,
        **shared,
    )


def _last(history: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The last logged value of each name."""
    return {name: row[name] for row in history for name in names if name in row}


def _arguments(
    recipe: PolicyTrainConfig,
    folder: Path,
    save_steps: int,
    logging_steps: int,
    report_to: str | Sequence[str],
    device: str | None,
) -> Any:
    from trl import DPOConfig, RLOOConfig

    kind = recipe.kind
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "bf16": recipe.bf16,
        "use_cpu": resolve_device(device).type == "cpu",
        "seed": recipe.seed,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": 2,
        "logging_steps": logging_steps,
        # A loss that is not finite ends the run, with the pairs that gave it.
        "logging_nan_inf_filter": False,
        "report_to": report_to,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **checkpointing(recipe.gradient_checkpointing),
        "beta": recipe.weight,
    }
    if kind.form is not None:
        return DPOConfig(**settings, max_length=None)
    return RLOOConfig(
        **settings,
        num_generations=recipe.samples,
        max_completion_length=recipe.max_new_tokens,
        temperature=recipe.temperature,
        num_iterations=recipe.iterations,
    )
