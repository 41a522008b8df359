"""Trains a policy in one call: DPO, SimPO, T-REG and RLOO by TRL's trainers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from rgtg_fast.deprecation import renamed_keywords
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.models.loading import context_length
from rgtg_fast.training.answer_scores import AnswerFile, fill_reference
from rgtg_fast.training.data import TrainingData
from rgtg_fast.training.folder import Progress, no_progress, one_run
from rgtg_fast.training.labels import RewardFunction, reward_function
from rgtg_fast.training.model import check_fork_layer, freeze_below, lora_config
from rgtg_fast.training.packing import use_packed_attention
from rgtg_fast.training.policy.config import PolicyTrainConfig
from rgtg_fast.training.policy.data import load_preferences, load_prompts
from rgtg_fast.training.run import Run, RunResult
from rgtg_fast.training.t_reg import Templates, fill_token_rewards
from rgtg_fast.training.vocabulary import load_causal

EXTRA = 'pip install "rgtg-fast[policy]"'


@renamed_keywords(recipe="config", say="progress", **PolicyTrainConfig.RENAMED)
@one_run
def train_policy(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    config: PolicyTrainConfig | None = None,
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
) -> RunResult:
    """Trains a language model on preferences with TRL and saves it as transformers and PEFT do.

    The output folder is a PEFT adapter or, with `full`, a model. Load it with
    `RewardGuidedDecoder.from_pretrained(folder, ...)` or `AutoModelForCausalLM.from_pretrained(folder)`. It also holds
    the tokenizer, the settings and what they were used on (`rgtg_fast.json`), and the log (`training_log.jsonl`).

    Args:
        model: folder or hub id of a causal language model: the initial policy and its reference.
        data: pairs to train on, as in `load_pairs`; for rloo, rows with a `prompt`.
        output: new folder, or the folder of a run to resume.
        config: what to learn and how.
        eval_data: pairs to evaluate on; without them, `config.held_out` of the data is split off by prompt.
        reward: what rloo maximizes: folder or hub id of a reward model or adapter, `bundled:NAME`, or a function as
            TRL calls it, f(prompts, completions, completion_ids, **columns) -> rewards.
        templates: templates of T-REG's contrastive prompts, by default the project's own.
        token_cache: folder for the reference's log-probabilities and token rewards, by default inside `output`; runs
            may share it.
        resume: continue from the last complete checkpoint in `output`.
        merged: folder for a whole model with the adapters merged.
        save_steps: optimizer steps between checkpoints.
        logging_steps: optimizer steps between lines of the log.
        report_to, callbacks: transformers' integrations and callbacks.
        device: "cpu" or "cuda"; None for CUDA where there is one.
        progress: receives lines about the progress.
        settings: fields of `PolicyTrainConfig` that take the place of those of `config`.

    Returns:
        Counts, metrics and the folder.

    Raises:
        RGTGError: a wrong argument, a loss that is not finite, or a full disk; one line each.

    Example:
        >>> result = train_policy("folder-of-a-model", "pairs.jsonl", "policy", objective="treg")  # doctest: +SKIP
    """
    config = (config or PolicyTrainConfig()).updated(settings)
    _check(config, reward, templates)
    arguments, more = _arguments(config)
    run = Run.prepare(
        config,
        output,
        arguments,
        more,
        resume=resume,
        merged=merged,
        save_steps=save_steps,
        logging_steps=logging_steps,
        report_to=report_to,
        device=device,
        progress=progress,
    )
    network, tokenizer = load_causal(model, run.dtype)
    _check_sizes(network, config)
    base = fingerprint(network)
    prompts_alone = config.kind.form is None
    found = (
        load_prompts(data, config, tokenizer)
        if prompts_alone
        else load_preferences(data, eval_data, config, tokenizer)
    )
    for line in found.lines:
        run.progress(line)
    if config.kind.token_rewards and templates is None:
        templates = Templates.load()
    run.begin(
        model,
        base,
        found,
        settings={
            "templates": None if templates is None else templates.digest,
            "reward": "a function" if callable(reward) else reward and str(reward),
        },
        templates=None if templates is None else asdict(templates),
        versions={"trl": importlib.metadata.version("trl")},
    )
    shared: dict[str, Any] = {
        "processing_class": tokenizer,
        "peft_config": None if config.full else lora_config(network, config.fork_layer, config.lora, None),
        "callbacks": [run.log, *callbacks],
    }
    if config.full:
        freeze_below(network, config.fork_layer)
    if prompts_alone:
        trainer = _policy_gradient_trainer(network, run.args, found, reward, shared)
    else:
        cache = token_cache or run.folder / "tokens"
        trainer = _preference_trainer(
            config, network, run.args, found, cache, templates, run.progress, shared
        )
    run.announce(trainer, f"{len(found.train):,} {'prompts' if prompts_alone else 'pairs'}")
    return run.train(trainer, evaluate=bool(found.evaluation))


def _check(
    config: PolicyTrainConfig,
    reward: str | os.PathLike[str] | RewardFunction | None,
    templates: Templates | None,
) -> None:
    """Checks that the objective's packages are installed and that it has the inputs that it needs, and no others."""
    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise RGTGError(f"training a policy needs {' and '.join(missing)}: {EXTRA}")
    if (reward is not None) != (config.objective == "rloo"):
        raise RGTGError(
            "rloo needs a reward to maximize: name a reward model"
            if reward is None
            else f"{config.objective} learns from pairs and takes no reward: leave it out, or use objective='rloo'"
        )
    if templates is not None and not config.kind.token_rewards:
        raise RGTGError(
            f"{config.objective} has no token rewards: leave out the templates, or use objective='treg'"
        )


def _check_sizes(network: PreTrainedModel, config: PolicyTrainConfig) -> None:
    """Checks the settings that depend on the model's layers and context."""
    check_fork_layer(network, config.fork_layer)
    layers = network.config.get_text_config().num_hidden_layers
    if config.fork_layer == layers and not config.full:
        raise RGTGError(f"fork_layer={layers} leaves no layer to adapt: use at most {layers - 1}")
    limit = context_length(network)
    if config.max_length > limit:
        raise RGTGError(f"max_length={config.max_length} exceeds the model's context: use at most {limit}")
    if config.kind.form is None and config.max_completion_length >= config.max_length:
        raise RGTGError(
            f"max_completion_length={config.max_completion_length} leaves no tokens for a prompt: use at most "
            f"{config.max_length - 1}"
        )


def _arguments(config: PolicyTrainConfig) -> tuple[Any, dict[str, Any]]:
    """The class of the trainer's arguments, and those that not every trainer has."""
    from trl import DPOConfig, RLOOConfig

    more: dict[str, Any] = {
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "num_train_epochs": config.num_train_epochs,
        "beta": config.loss_beta,
    }
    if config.kind.form is not None:
        return DPOConfig, more | {"max_length": None}
    return RLOOConfig, more | {
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "num_iterations": config.num_iterations,
    }


def _policy_gradient_trainer(
    network: PreTrainedModel, args: Any, found: TrainingData, reward: Any, shared: dict[str, Any]
) -> Any:
    from datasets import Dataset

    from rgtg_fast.training.policy.trainer import PolicyGradientTrainer

    function: Any = (
        reward if callable(reward) else reward_function(reward, network, shared["processing_class"])
    )
    prompts = [{"prompt": found.sources[0][pair.index].prompt, "row": pair.index} for pair in found.train]
    return PolicyGradientTrainer(
        network, reward_funcs=function, args=args, train_dataset=Dataset.from_list(prompts), **shared
    )


def _preference_trainer(
    config: PolicyTrainConfig,
    network: PreTrainedModel,
    args: Any,
    found: TrainingData,
    cache: str | os.PathLike[str],
    templates: Templates | None,
    progress: Progress,
    shared: dict[str, Any],
) -> Any:
    from rgtg_fast.training.policy.trainer import TRegTrainer, preference_dataset

    kind, tokenizer = config.kind, shared["processing_class"]
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
        alpha=config.alpha if kind.token_rewards else 0.0,
        form=str(kind.form),
        margin=config.margin,
        **shared,
    )
