"""Trains a reward model in one call: from preference pairs to a saved adapter or model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from rgtg_fast.deprecation import RenamedAttribute, renamed_keywords
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.device import resolve_device
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.processes import Place
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.data import TokenizedPair, TrainingData, load_pairs, prepare_pairs, read_rows
from rgtg_fast.training.folder import Progress, no_progress, one_run
from rgtg_fast.training.labels import LABELS_FILE, LabelJudge, Targets, as_probabilities, spread, targets_in
from rgtg_fast.training.model import EXTRA, HEAD, add_adapters, check_fork_layer, freeze_below, load_base
from rgtg_fast.training.run import Run, RunResult
from rgtg_fast.training.trainer import Metrics, PartialRewardTrainer
from rgtg_fast.training.vocabulary import VOCABULARY_HEAD, load_causal


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """The result of training a reward model.

    Attributes:
        rows: packed rows.
        packing_efficiency: share of the rows' tokens that are not padding.
    """

    rows: int
    packing_efficiency: float
    filled = RenamedAttribute("packing_efficiency")


@renamed_keywords(recipe="config", say="progress", **TrainConfig.RENAMED)
@one_run
def train_reward_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    eval_data: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None,
    resume: bool = False,
    merged: str | os.PathLike[str] | None = None,
    save_steps: int = 50,
    eval_steps: int | None = None,
    logging_steps: int = 10,
    trunk_cache: str | os.PathLike[str] | None = None,
    cache_trunk: bool = True,
    metrics: Metrics | None = None,
    report_to: str | Sequence[str] = "none",
    callbacks: Sequence[TrainerCallback] = (),
    device: str | None = None,
    fsdp: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> TrainResult:
    """Trains a reward model on preference pairs and saves it.

    The output folder is a PEFT adapter or, with `full`, a model. Load it with
    `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)`, or with `AutoModelForCausalLM` after
    farma and genarm. It also holds the tokenizer, the settings and what they were used on (`rgtg_fast.json`), and the
    log (`training_log.jsonl`).

    Args:
        model: folder or hub id of a causal language model or of a reward model.
        data: pairs to train on, as in `load_pairs`.
        output: new folder, or the folder of a run to resume.
        config: what to learn and how.
        eval_data: pairs to evaluate on; without them, `config.held_out` of the data is split off by prompt.
        resume: continue from the last complete checkpoint in `output`.
        merged: folder for a whole model with the adapters merged.
        save_steps: optimizer steps between checkpoints.
        eval_steps: optimizer steps between evaluations; None evaluates after training only.
        logging_steps: optimizer steps between lines of the log.
        trunk_cache: folder for the activations below the fork, by default inside `output`; runs may share it.
        cache_trunk: False runs the layers below the fork in every step.
        metrics: computes further metrics from the evaluation pairs' rewards.
        report_to, callbacks: transformers' integrations and callbacks.
        device: "cpu" or "cuda"; None for CUDA where there is one.
        fsdp: whether the processes hold the weights together (accelerate's FSDP2), for a model that is larger than a
            GPU. The saved files are those of one process.
        progress: receives lines about the progress.
        settings: fields of `TrainConfig` that take the place of those of `config`.

    Returns:
        Counts, metrics and the folder.

    Raises:
        RGTGError: a wrong argument, a loss that is not finite, or a full disk; one line each.

    Example:
        >>> result = train_reward_model("some-model", "pairs.jsonl", "my-reward", fork_layer=20)  # doctest: +SKIP
    """
    config = (config or TrainConfig()).updated(settings)
    if importlib.util.find_spec("accelerate") is None:
        raise RGTGError(f"training needs accelerate, which is not installed: {EXTRA}")
    if fsdp:
        _check_sharding(device, config.fork_layer > 0 and cache_trunk)
    run = Run.prepare(
        config,
        output,
        TrainingArguments,
        _arguments(config, eval_steps, fsdp),
        resume=resume,
        merged=merged,
        save_steps=save_steps,
        logging_steps=logging_steps,
        report_to=report_to,
        device=device,
        progress=progress,
    )
    network, tokenizer = _load(model, config, run)
    base = fingerprint(network)
    found = _load_data(data, eval_data, config, tokenizer)
    for line in found.prepared.lines:
        run.progress(line)
    train, evaluation = found.prepared.train, found.prepared.evaluation
    for part in (train, evaluation):
        config.objective_config.check_ends(part, config.head_fit is not None)
    run.begin(model, base, found.prepared)
    targets, eval_targets = _targets(found, run, network, tokenizer)
    if not evaluation:
        run.args.eval_strategy = IntervalStrategy.NO
    trainer = PartialRewardTrainer(
        _trained_model(network, config),
        run.args,
        train,
        evaluation,
        processing_class=tokenizer,
        objective=config.objective_config,
        token_budget=config.token_budget,
        fork_layer=config.fork_layer,
        trunk_cache=(trunk_cache or run.folder / "trunk") if cache_trunk else None,
        head_learning_rate=config.head_learning_rate,
        targets=targets,
        eval_targets=eval_targets,
        metrics=metrics,
        pad_id=network.config.pad_token_id or 0,
        progress=run.progress,
        callbacks=[run.log, *callbacks],
    )
    rows, efficiency = len(trainer.rows), trainer.packing_efficiency
    run.announce(trainer, f"{len(train):,} pairs in {rows:,} rows ({efficiency:.1%} filled)")
    if config.head_fit is not None and run.checkpoint is None:
        run.progress("fitting the head on the frozen model")
        trainer.fit_head(config.head_fit)
    result = run.train(trainer, evaluate=bool(evaluation))
    return TrainResult(**vars(result), rows=rows, packing_efficiency=efficiency)


def _check_sharding(device: str | None, cached: bool) -> None:
    """Checks what it needs that processes hold the weights together.

    Raises:
        RGTGError: a single process, a CPU, where accelerate leaves FSDP out silently, or layers that are detached.
    """
    if Place.from_environment().count == 1:
        raise RGTGError(
            "fsdp in a single process: start it with torchrun --nproc-per-node N, or leave fsdp out"
        )
    if resolve_device(device).type == "cpu":
        raise RGTGError("fsdp on a CPU: accelerate shards weights on GPUs alone, leave fsdp out")
    if cached:
        raise RGTGError(
            "fsdp and a cache of what the layers below the fork compute: use cache_trunk=False (--no-trunk-cache)"
        )


def _arguments(config: TrainConfig, eval_steps: int | None, fsdp: bool = False) -> dict[str, Any]:
    sharding: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if fsdp else {}
    return {
        **sharding,
        "per_device_train_batch_size": 1,
        "num_train_epochs": config.num_train_epochs * config.objective_config.passes,
        "eval_strategy": "no" if eval_steps is None else "steps",
        "eval_steps": eval_steps,
        "ddp_find_unused_parameters": False,
    }


def _load(
    model: str | os.PathLike[str], config: TrainConfig, run: Run
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, with the head that its objective reads, and its tokenizer."""
    if config.objective_config.by_token:
        network, tokenizer = load_causal(model, run.dtype, new_head=config.objective == "farma")
    else:
        network, tokenizer = load_base(model, run.dtype, run.progress)
    check_fork_layer(network, config.fork_layer)
    return network, tokenizer


def _trained_model(network: PreTrainedModel, config: TrainConfig) -> Any:
    """The model with the adapters and the head that are trained, or with the weights below the fork frozen."""
    if config.full:
        freeze_below(network, config.fork_layer)
        return network
    head = {"farma": VOCABULARY_HEAD, "genarm": None}.get(config.objective, HEAD)
    return add_adapters(network, config.fork_layer, config.lora, head)


@dataclass(frozen=True)
class _Data:
    """Tokenized pairs, and the rows that they come from with their rewards, which a regression needs.

    Attributes:
        rows, eval_rows: as they were read, for a judge; the same where the evaluation pairs were split off.
        targets, eval_targets: rewards that the rows give the answers, None where they give none.
    """

    prepared: TrainingData
    rows: Any
    eval_rows: Any
    targets: Targets | None
    eval_targets: Targets | None


def _load_data(data: Any, eval_data: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> _Data:
    regression = config.objective_config.regression

    def load(source: Any) -> Any:
        # A regression reads the rows twice: for their pairs and for their rewards.
        rows = list(read_rows(source)) if regression else source
        chat = tokenizer.chat_template is not None
        loaded = load_pairs(rows, chat=chat, answers_ended=config.answers_ended)
        targets = targets_in(rows, loaded[0]) if regression and not config.judge else None
        return loaded, rows, targets

    loaded, rows, targets = load(data)
    eval_loaded, eval_rows, eval_targets = (None, rows, targets) if eval_data is None else load(eval_data)
    limited = config.limit is not None and config.limit < len(loaded[0])
    notes = [f"the first {config.limit:,} of these are taken"] if limited else []
    prepared = prepare_pairs(loaded, eval_loaded, config, tokenizer, notes)
    return _Data(prepared, rows, eval_rows, targets, eval_targets)


def _targets(
    found: _Data, run: Run, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Targets | None, Targets | None]:
    """The answers' rewards, of the pairs to train on and of those to evaluate on: the data's own or the judge's."""
    config: Any = run.config
    if config.judge is None:
        return found.targets, found.eval_targets
    # One process rates the answers, the others read its file.
    with run.args.main_process_first(desc="the judge's rewards"):
        judge = LabelJudge(config.judge, (network, tokenizer), run.args.device)

        def labels(pairs: list[TokenizedPair], rows: list[Any], file: str) -> Targets:
            wanted = {pair.index for pair in pairs}
            return judge.label(
                rows, wanted, run.folder / file, config.token_budget, run.progress, config.answers_ended
            )

        targets = labels(found.prepared.train, found.rows, LABELS_FILE)
        mean, deviation = spread(targets)
        run.progress(f"rewards by {config.judge}: mean {mean:.3f}, standard deviation {deviation:.3f}")
        eval_targets: Targets = {}
        if found.prepared.evaluation:
            file = LABELS_FILE if found.eval_rows is found.rows else f"eval_{LABELS_FILE}"
            eval_targets = labels(found.prepared.evaluation, found.eval_rows, file)
    if config.objective == "rad":
        return as_probabilities(targets, mean), as_probabilities(eval_targets, mean)
    return targets, eval_targets
