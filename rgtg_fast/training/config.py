"""One call from preference pairs to a saved reward model: data, model, trainer, checkpoints, evaluation."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import fingerprint
from rgtg_fast.models.loading import resolve_device
from rgtg_fast.training.activation_cache import hash_pairs
from rgtg_fast.training.data import (
    DataReport,
    PreferencePair,
    TokenizedPair,
    check_answers_ended,
    load_pairs,
    read_rows,
    split_by_prompt,
    tokenize_pairs,
)
from rgtg_fast.training.labels import LABELS_FILE, LabelJudge, Targets, as_probabilities, spread
from rgtg_fast.training.layouts import Row
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import (
    EXTRA,
    HEAD,
    Lora,
    add_adapters,
    check_fork_layer,
    freeze_below,
    load_base,
    merge,
    trained_parameters,
)
from rgtg_fast.training.probe import check_strength
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
from rgtg_fast.training.trainer import Metrics, PartialRewardTrainer
from rgtg_fast.training.vocabulary import VOCABULARY_HEAD, load_causal

# Columns of the data with the answers' rewards, for objectives that regress onto them.
REWARD_COLUMNS = ("chosen_reward", "rejected_reward")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training run learns.

    Attributes:
        objective, mode, weight, beta_r, stop_gradient: see `Objective`.
        judge: folder or hub id of a reward model, or `bundled:NAME`, that gives the answers the rewards which cd_fudge
            regresses onto; rad gets σ(reward − mean) of them. None for the data's own.
        fork_layer: layers below it are frozen and run once; 0 trains all of them.
        full: train the weights themselves instead of LoRA adapters.
        lora_rank, lora_alpha, lora_dropout: see `Lora`.
        epochs: passes over the pairs; with farma, rounds of two passes.
        learning_rate: at its height; it warms up over `warmup` of the steps and falls along a cosine to 0.
        head_learning_rate: of the score head (farma: of the vocabulary head); None for the same.
        head_fit: fit the head (farma: its row of the end-of-sequence token) on the frozen model first, with a penalty
            of this strength (see `probe`); None begins with a head of zeros.
        weight_decay: of all but biases and norms.
        token_budget: tokens of a packed row. accumulation: rows of an optimizer step on one process.
        answers_ended: see `load_pairs`: "auto" by the data's finish_reason, "yes" or "no" for all. An end token stands
            behind answers that ended, and whole answers are read there; those that were cut at their last text token.
        max_length: tokens of a prompt and its longer answer. min_answer_tokens: shorter answers are dropped.
        held_out: share of the pairs, by prompt, to evaluate on where no evaluation data are named.
        limit: pairs to take at most, from the beginning of the data.
        bf16: the trunk computes in bfloat16; trained weights stay float32.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        seed: of the order, the initial adapters and dropout.
    """

    objective: str = "partial_bt"
    mode: str = "hold"
    weight: str = "prefix"
    beta_r: float = 0.05
    stop_gradient: bool = False
    judge: str | None = None
    fork_layer: int = 0
    full: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    epochs: float = 1.0
    learning_rate: float = 2e-4
    head_learning_rate: float | None = None
    head_fit: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    token_budget: int = 2048
    accumulation: int = 4
    answers_ended: str = "auto"
    max_length: int = 512
    min_answer_tokens: int = 0
    held_out: float = 0.1
    limit: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_strength(self.head_fit, self.objective_config)
        if self.head_learning_rate is not None and self.objective == "genarm":
            raise RGTGError("genarm trains no head of its own: leave out head_learning_rate")
        if self.judge is not None and not self.objective_config.regression:
            raise RGTGError(f"{self.objective} compares answers and needs no rewards: leave out the judge")
        check_answers_ended(self.answers_ended)
        Lora(self.lora_rank, self.lora_alpha, self.lora_dropout)
        counts = {"token_budget": 2, "accumulation": 1, "max_length": 2, "min_answer_tokens": 0, "limit": 1}
        above = ("epochs", "learning_rate", "head_learning_rate", "lora_alpha")
        check_recipe(self, counts, above, ("weight_decay",))

    @property
    def objective_config(self) -> Objective:
        """The objective with its settings."""
        return Objective(self.objective, self.mode, self.weight, self.beta_r, self.stop_gradient)


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        output: the saved folder.
        steps: optimizer steps. rows, filled: packed rows and the share of their tokens that are no padding.
        trained: parameters that were trained.
        seconds: of the training proper.
        data: counts of the data.
        metrics: of the evaluation after training, without the prefix `eval_`.
    """

    output: Path
    steps: int
    rows: int
    filled: float
    trained: int
    seconds: float
    data: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)


@one_run
def train_reward_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    recipe: TrainConfig | None = None,
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
    progress: Progress = lambda message: None,
    **settings: Any,
) -> TrainResult:
    """Trains a reward model on preference pairs and saves it.

    The output folder is a PEFT adapter (or, with `full`, a model), which
    `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)` loads, or `AutoModelForCausalLM` what
    farma and genarm made; beside it lie the tokenizer, the recipe and what it was used on (`rgtg_fast.json`), and the
    log (`training_log.jsonl`).

    Args:
        model: folder or hub id of a causal language model or of a reward model.
        data, eval_data: as in `load_pairs`; without `eval_data`, `recipe.held_out` of the data is split off by prompt.
        output: new folder, or that of a run to resume.
        recipe: what to learn and how; single fields may be passed by name as well.
        resume: go on from the last complete checkpoint in `output`.
        merged: also write a whole model with the adapters merged here.
        save_steps, eval_steps, logging_steps: optimizer steps between checkpoints, evaluations (None: only after
            training) and lines of the log.
        trunk_cache: folder for the activations below the fork, by default inside `output`; several runs may share one.
        cache_trunk: False runs the layers below the fork in every step.
        metrics: more metrics from the evaluation pairs' rewards.
        report_to, callbacks: transformers' integrations and callbacks.
        device: "cpu" or "cuda"; None for CUDA where there is one.
        say: receives lines about the progress.

    Raises:
        RGTGError: one line for everything that a user can get wrong, a loss that is not finite, and a full disk.

    Example:
        >>> result = train_reward_model("folder-of-a-model", "pairs.jsonl", "guide", fork_layer=20)  # doctest: +SKIP
    """
    recipe = replace(recipe or TrainConfig(), **_known(settings))
    if importlib.util.find_spec("accelerate") is None:
        raise RGTGError(f"training needs accelerate, which is not installed: {EXTRA}")
    check_steps(save_steps=save_steps, eval_steps=eval_steps, logging_steps=logging_steps)
    check_reports(report_to)
    folder = Path(output)
    args = _arguments(recipe, folder, save_steps, eval_steps, logging_steps, report_to, device)
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
    objective, dtype = recipe.objective_config, torch.bfloat16 if half else torch.float32
    if objective.by_token:
        network, tokenizer = load_causal(model, dtype, new_head=objective.name == "farma")
    else:
        network, tokenizer = load_base(model, dtype, progress)
    check_fork_layer(network, recipe.fork_layer)
    base = fingerprint(network)
    found = _data(data, eval_data, recipe, tokenizer)
    train, evaluation = found.train, found.evaluation
    for line in found.lines:
        progress(line)
    for part in (train, evaluation):
        objective.check_ends(part, recipe.head_fit is not None)
    facts = {
        "recipe": asdict(recipe),
        "base_model": str(model),
        "base_fingerprint": base,
        "data_sha256": hash_pairs(train),
        "eval_data_sha256": hash_pairs(evaluation) if evaluation else None,
        "data": found.report,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with args.main_process_first(desc="the output folder"):
        if main:
            begin(folder, facts, resume)
    targets, eval_targets = found.targets, found.eval_targets
    if recipe.judge is not None:
        # One process rates the answers, the others read its file.
        with args.main_process_first(desc="the judge's rewards"):
            judge = LabelJudge(recipe.judge, (network, tokenizer), args.device)
            targets, eval_targets = _labels(judge, found, recipe, folder, progress)
    checkpoint = get_last_checkpoint(str(folder)) if resume else None
    if not evaluation:
        args.eval_strategy = IntervalStrategy.NO
    wrapped: Any = network
    if recipe.full:
        freeze_below(network, recipe.fork_layer)
    else:
        head = {"farma": VOCABULARY_HEAD, "genarm": None}.get(objective.name, HEAD)
        lora = Lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout)
        wrapped = add_adapters(network, recipe.fork_layer, lora, head)
    log = TrainingLog(folder / LOG_FILE, progress)
    trainer = PartialRewardTrainer(
        wrapped,
        args,
        train,
        evaluation,
        processing_class=tokenizer,
        objective=objective,
        token_budget=recipe.token_budget,
        fork_layer=recipe.fork_layer,
        trunk_cache=(trunk_cache or folder / "trunk") if cache_trunk else None,
        head_learning_rate=recipe.head_learning_rate,
        targets=targets,
        eval_targets=eval_targets,
        metrics=metrics,
        pad_id=network.config.pad_token_id or 0,
        progress=progress,
        callbacks=[log, *callbacks],
    )
    for console in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(console)
    trained = sum(p.numel() for _, p in trained_parameters(wrapped))
    progress(
        f"training {trained:,} parameters on {len(train):,} pairs in {len(trainer.rows):,} rows "
        f"({trainer.filled:.1%} filled), {'from ' + checkpoint if checkpoint else 'from the start'}"
    )
    if recipe.head_fit is not None and checkpoint is None:
        progress("fitting the head on the frozen model")
        trainer.fit_head(recipe.head_fit)
    trainer.train(resume_from_checkpoint=checkpoint)
    result = trainer.evaluate() if evaluation else {}
    trainer.save_to(folder)
    outcome = TrainResult(
        folder,
        trainer.state.global_step,
        len(trainer.rows),
        trainer.filled,
        trained,
        log.seconds,
        facts["data"],
        {name.removeprefix("eval_"): value for name, value in result.items()},
    )
    if main:
        write_json(folder / RECIPE_FILE, facts | {"steps": outcome.steps, "metrics": outcome.metrics})
        if merged is not None:
            merge(folder, merged)
    return outcome


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(TrainConfig)]
    unknown = next((name for name in settings if name not in names), None)
    if unknown is not None:
        raise RGTGError(f"there is no setting {unknown!r}: use one of {', '.join(names)}")
    return settings


@dataclass(frozen=True)
class _Data:
    """Tokenised pairs, the rewards that came with them, and the counts.

    Attributes:
        rows, eval_rows: as they were read, for a judge; the same where the evaluation pairs were split off.
        report: counts by stage. lines: the same in words.
    """

    train: list[TokenizedPair]
    evaluation: list[TokenizedPair]
    rows: list[Any]
    eval_rows: list[Any]
    targets: Targets | None
    eval_targets: Targets | None
    report: dict[str, Any]
    lines: list[str]


def _data(data: Any, eval_data: Any, recipe: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> _Data:
    chat = tokenizer.chat_template is not None
    regression = recipe.objective_config.regression
    # Rows are read twice: for their pairs and for their rewards.
    rows = eval_rows = list(read_rows(data)) if regression else data
    pairs, loaded, targets = _load(rows, chat, recipe)
    cut = (
        []
        if recipe.limit is None or recipe.limit >= len(pairs)
        else [f"the first {recipe.limit:,} of these are taken"]
    )
    pairs = pairs[: recipe.limit]
    held: list[PreferencePair] = []
    eval_loaded, eval_targets = DataReport(), targets
    if eval_data is not None:
        eval_rows = list(read_rows(eval_data)) if regression else eval_data
        held, eval_loaded, eval_targets = _load(eval_rows, chat, recipe)
    elif recipe.held_out > 0:
        pairs, held = split_by_prompt(pairs, recipe.held_out, recipe.seed)

    def tokens(part: list[PreferencePair]) -> tuple[list[TokenizedPair], DataReport]:
        return tokenize_pairs(
            part,
            tokenizer,
            recipe.max_length,
            min_answer_tokens=recipe.min_answer_tokens,
            chat=chat,
        )

    train, fitted = tokens(pairs)
    evaluation, eval_fitted = tokens(held) if held else ([], DataReport())
    report: dict[str, Any] = {"loaded": loaded.as_dict(), "train": fitted.as_dict()}
    lines = [f"data: {line}" for line in (*loaded.lines(), *cut, *fitted.lines()[1:], fitted.end_line())]
    if held:
        report["eval"] = (eval_loaded + eval_fitted if eval_data is not None else eval_fitted).as_dict()
        lines.append(f"evaluation: {eval_fitted.lines()[0]}")
    return _Data(train, evaluation, rows, eval_rows, targets, eval_targets, report, lines)


def _labels(
    judge: LabelJudge, found: _Data, recipe: TrainConfig, folder: Path, progress: Progress
) -> tuple[Targets, Targets]:
    """The judge's rewards of the pairs to train on and of those to evaluate on."""

    def labels(pairs: list[TokenizedPair], rows: list[Any], file: str) -> Targets:
        wanted = {pair.index for pair in pairs}
        return judge.label(rows, wanted, folder / file, recipe.token_budget, progress, recipe.answers_ended)

    targets = labels(found.train, found.rows, LABELS_FILE)
    mean, deviation = spread(targets)
    progress(f"rewards by {recipe.judge}: mean {mean:.3f}, standard deviation {deviation:.3f}")
    eval_targets: Targets = {}
    if found.evaluation:
        file = LABELS_FILE if found.eval_rows is found.rows else f"eval_{LABELS_FILE}"
        eval_targets = labels(found.evaluation, found.eval_rows, file)
    if recipe.objective == "rad":
        targets, eval_targets = (as_probabilities(part, mean) for part in (targets, eval_targets))
    return targets, eval_targets


def _load(
    rows: Any, chat: bool, recipe: TrainConfig
) -> tuple[list[PreferencePair], DataReport, Targets | None]:
    """Pairs, and for a regression without a judge the rewards that their rows give the answers, where they do."""
    pairs, report = load_pairs(rows, chat=chat, answers_ended=recipe.answers_ended)
    if (
        not recipe.objective_config.regression
        or recipe.judge
        or set(REWARD_COLUMNS).isdisjoint(Row(rows[pairs[0].index]).names)
    ):
        return pairs, report, None
    targets: Targets = {}
    for pair in pairs:
        values = [Row(rows[pair.index])[name] for name in REWARD_COLUMNS]
        try:
            chosen, rejected = map(float, values)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            chosen = rejected = math.nan
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            raise RGTGError(
                f"row {pair.index} of the data has the rewards {values}: give every row a number in "
                f"{' and '.join(REWARD_COLUMNS)}, or none of them"
            )
        targets[pair.index] = (chosen, rejected)
    return pairs, report, targets


def _arguments(
    recipe: TrainConfig,
    folder: Path,
    save_steps: int,
    eval_steps: int | None,
    logging_steps: int,
    report_to: str | Sequence[str],
    device: str | None,
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.accumulation,
        num_train_epochs=recipe.epochs * recipe.objective_config.passes,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        bf16=recipe.bf16,
        use_cpu=resolve_device(device).type == "cpu",
        seed=recipe.seed,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        eval_strategy="no" if eval_steps is None else "steps",
        eval_steps=eval_steps,
        logging_steps=logging_steps,
        # A loss that is not finite ends the run, with the pairs that gave it.
        logging_nan_inf_filter=False,
        report_to=report_to,  # pyright: ignore[reportArgumentType]
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **checkpointing(recipe.gradient_checkpointing),
    )
