"""Times training on prefixes: packed rows against one row per prefix and against TRL's full-sequence trainer.

    python -m benchmarks.train                      # about five minutes on two cores, into results/train.csv
    python -m benchmarks.train --limit 64 --full    # more pairs, all weights trained

Three ways over the same pairs, model, dtype and trained weights:

- `packed`: PartialRewardTrainer; every prefix of both answers in one forward, in mode "eos" (published) and
  "repeat_last", which results files call "hold".
- `one_row_per_prefix`: the published way; prefix i of the chosen and of the rejected answer are two rows, sorted by
  length and batched to a token budget, without attention masks, and only the last position goes through the head. It
  would take hours, so batches drawn evenly from the sorted list are timed and the rest is extrapolated by tokens.
- `trl`: TRL's RewardTrainer on whole answers, length-grouped; the best of several batch sizes.

Before anything is timed, the packed loss and its gradient are compared with those of one row per prefix. The timings
of the two trainers include their optimizer steps and data loading, those of `one_row_per_prefix` do not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks.harness import MACHINE, RESULTS, append, shown
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bundled import embedded
from rgtg_fast.errors import RGTGError
from rgtg_fast.ops import partial_bt_loss
from rgtg_fast.training.config import RENAMED_MODES
from rgtg_fast.training.data import TokenizedPair, load_pairs, tokenize_pairs
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import HEAD, Lora, add_adapters, load_base, trained_parameters
from rgtg_fast.training.packing import collate, cost, pack, packed_rewards, pretrained, use_packed_attention
from rgtg_fast.training.run import checkpointing
from rgtg_fast.training.trainer import PartialRewardTrainer

METHODS = ("packed", "one_row_per_prefix", "trl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative difference of loss and gradient at which the two ways count as the same computation.
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.1}
# Pairs per optimizer step of TRL's trainer, in batches of these sizes with accumulation.
TRL_STEP = 8
TRL_BATCHES = (1, 4, 8)

COLUMNS = (
    "date",
    *MACHINE,
    "trl",
    "peft",
    "model",
    "device",
    "dtype",
    "tuning",
    "data",
    "max_length",
    "pairs",
    "seed",
    "omp_wait_policy",
    "method",
    "mode",
    "token_budget",
    "pairs_per_batch",
    "tokens_per_pair",
    "filled",
    "seconds",
    "pairs_per_second",
    "tokens_per_second",
    "time_is",
    "loss_difference",
    "gradient_difference",
    "data_pairs",
    "data_tokens_per_pair",
)


@dataclass(frozen=True)
class Job:
    """What all methods share: the pairs, and how to create the model."""

    pairs: list[TokenizedPair]
    source: str
    dtype: torch.dtype
    full: bool
    device: str
    token_budget: int
    seed: int

    def model(self) -> Any:
        """The model to train, with a random score head and adapters: zeros would hide differences of gradients."""
        network, _ = load_base(self.source, self.dtype)
        model: Any = network if self.full else add_adapters(network, 0, Lora())
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in trained_parameters(model):
            if HEAD in name.split(".") or "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = (0.02 * noise).to(parameter.dtype)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == HEAD:
                module.to(self.dtype)
        return model.to(self.device)


@dataclass(frozen=True)
class Timed:
    """Seconds for all pairs and the tokens that went through the model."""

    method: str
    mode: str
    seconds: float
    tokens: int
    real_tokens: int
    pairs_per_batch: float
    time_is: str = "measured"


class Meter(TrainerCallback):
    """Counts the tokens that enter the trunk, padding included, and the seconds of a trainer's loop."""

    def __init__(self, model: nn.Module):
        self.tokens, self.start, self.seconds = 0, 0.0, 0.0
        trunk = pretrained(model).base_model
        self.handle = trunk.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tokens += ids.numel()

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        _wait(args.device.type)
        self.seconds = time.perf_counter() - self.start
        self.handle.remove()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def prefixes(pair: TokenizedPair) -> Iterator[tuple[list[int], list[int]]]:
    """The published rows of a pair: prefix i of the chosen and of the rejected answer, the shorter padded with EOS."""
    n = max(len(pair.chosen_ids), len(pair.rejected_ids))
    chosen, rejected = ([*ids, *ids[-1:] * (n - len(ids))] for ids in (pair.chosen_ids, pair.rejected_ids))
    for i in range(1, n + 1):
        yield pair.prompt_ids + chosen[:i], pair.prompt_ids + rejected[:i]


def batches_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of row pairs, shortest first, in batches of at most `token_budget` tokens, padding included."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and 2 * lengths[index] * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def loss_of_rows(model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], device: str) -> torch.Tensor:
    """Sum of the Bradley-Terry terms of prefix pairs, each prefix a row of its own."""
    longest = max(len(ids) for row in rows for ids in row)
    ids = torch.zeros(2 * len(rows), longest, dtype=torch.long)
    last = torch.empty(2 * len(rows), dtype=torch.long)
    for i, one in enumerate(one for row in rows for one in row):
        ids[i, : len(one)] = torch.tensor(one)
        last[i] = len(one) - 1
    inner = pretrained(model)
    # Padding is on the right, which causal attention never reads: no mask is needed, so the fastest kernel runs.
    hidden = inner.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    rewards = dict(inner.named_children())[HEAD](hidden[torch.arange(len(ids)), last.to(device)])[:, 0]
    return F.softplus(rewards[1::2].float() - rewards[::2].float()).sum()


def check(job: Job, pairs: Sequence[TokenizedPair], count: int = 2) -> tuple[float, float]:
    """Compares packed rows with one row per prefix on the pairs with the fewest tokens.

    Args:
        job: the model and its settings.
        pairs: to choose from; those with an answer of less than 8 tokens are skipped where there are others.
        count: how many to compare on.

    Returns:
        Relative differences of the loss and (by norm, over all trained weights) of the gradient.

    Raises:
        RGTGError: they are not the same computation.
    """
    worthy = [pair for pair in pairs if min(len(pair.chosen_ids), len(pair.rejected_ids)) >= 8] or pairs
    cheapest = sorted(
        worthy,
        key=lambda p: max(len(p.chosen_ids), len(p.rejected_ids)) * (len(p.prompt_ids) + cost(p, True)),
    )[:count]
    model = job.model().eval()
    weights = [parameter for _, parameter in trained_parameters(model)]
    rows = [row for pair in cheapest for row in prefixes(pair)]
    loss = torch.zeros((), device=job.device)
    gradient = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for batch in batches_by_length([len(row[0]) for row in rows], job.token_budget):
        part = loss_of_rows(model, [rows[i] for i in batch], job.device) / len(rows)
        loss += part.detach()
        for total, one in zip(gradient, torch.autograd.grad(part, weights, allow_unused=True), strict=True):
            if one is not None:
                total += one.float()
    use_packed_attention(model)
    batch = collate(cheapest, pack(cheapest, job.token_budget, True), 0, eos_padding=True).to(job.device)
    packed = partial_bt_loss(*packed_rewards(model, batch), "eos", "prefix")
    ours = torch.autograd.grad(packed, weights, allow_unused=True)
    off = sum(
        float((total if one is None else total - one.float()).square().sum())
        for total, one in zip(gradient, ours, strict=True)
    )
    size = sum(float(total.square().sum()) for total in gradient)
    differences = (float((packed.detach() - loss).abs() / loss), (off / size) ** 0.5)
    limit = AGREEMENT[str(job.dtype).removeprefix("torch.")]
    if not max(differences) <= limit:
        raise RGTGError(
            f"packed rows and one row per prefix differ by {differences[0]:.2g} in the loss and {differences[1]:.2g} "
            f"in the gradient (limit {limit}): nothing was timed"
        )
    return differences


def _arguments(job: Job, folder: str, batch: int, accumulation: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "bf16": False,
        "seed": job.seed,
    }


def _warm_up(job: Job, model: nn.Module) -> None:
    """A first backward, which allocates and selects kernels."""
    loss_of_rows(model, [next(prefixes(job.pairs[0]))], job.device).backward()
    model.zero_grad()


def time_packed(job: Job, mode: str) -> Timed:
    """An epoch of PartialRewardTrainer over the pairs, one row a step."""
    model = job.model()
    _warm_up(job, model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PartialRewardTrainer(
            model,
            TrainingArguments(**_arguments(job, folder, 1, 1)),
            job.pairs,
            objective=Objective(mode=RENAMED_MODES.get(mode, mode)),
            token_budget=job.token_budget,
        )
        meter = Meter(model)
        trainer.add_callback(meter)
        trainer.train()
    real = sum(cost(pair, mode == "eos") for pair in job.pairs)
    return Timed("packed", mode, meter.seconds, meter.tokens, real, len(job.pairs) / len(trainer.rows))


def time_one_row_per_prefix(job: Job, batches: int) -> Timed:
    """Forward and backward over evenly drawn batches; the seconds of the whole job are extrapolated by tokens."""
    model = job.model()
    _warm_up(job, model)
    rows = [row for pair in job.pairs for row in prefixes(pair)]
    lengths = [len(row[0]) for row in rows]
    every = batches_by_length(lengths, job.token_budget)
    # The middle of each of n equal parts of the sorted list.
    n = min(batches, len(every))
    drawn = [every[int((i + 0.5) * len(every) / n)] for i in range(n)]
    start = time.perf_counter()
    for batch in drawn:
        (loss_of_rows(model, [rows[i] for i in batch], job.device) / len(batch)).backward()
        model.zero_grad()
    _wait(job.device)
    seconds = time.perf_counter() - start

    def padded(some: Sequence[Sequence[int]]) -> int:
        return sum(2 * len(batch) * lengths[batch[-1]] for batch in some)

    measured = n == len(every)
    return Timed(
        "one_row_per_prefix",
        "eos",
        seconds * padded(every) / padded(drawn),
        padded(every),
        2 * sum(lengths),
        len(job.pairs) / len(every),
        "measured" if measured else f"extrapolated by tokens from {n} of {len(every)} batches",
    )


def time_trl(job: Job, batch: int) -> Timed:
    """An epoch of TRL's RewardTrainer over the same token ids."""
    try:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer
    except ImportError as error:
        raise RGTGError(
            "the comparison with TRL needs it (pip install trl datasets); leave it out by "
            "--methods packed one_row_per_prefix"
        ) from error
    model = job.model()
    _warm_up(job, model)
    whole = [
        {"chosen_ids": pair.prompt_ids + pair.chosen_ids, "rejected_ids": pair.prompt_ids + pair.rejected_ids}
        for pair in job.pairs
    ]
    lengths = [max(map(len, one.values())) for one in whole]
    data = Dataset.from_list([one | {"length": n} for one, n in zip(whole, lengths, strict=True)])
    tokenizer = AutoTokenizer.from_pretrained(job.source)
    with tempfile.TemporaryDirectory() as folder:
        settings = RewardConfig(
            **_arguments(job, folder, batch, max(1, TRL_STEP // batch)),
            max_length=None,
            **checkpointing(False),
            train_sampling_strategy="group_by_length",
            # Keeps the column of lengths.
            remove_unused_columns=False,
        )
        trainer = RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        meter = Meter(model)
        trainer.add_callback(meter)
        trainer.train()
    real = sum(len(ids) for one in whole for ids in one.values())
    return Timed("trl", "", meter.seconds, meter.tokens, real, batch)


def tokens_per_pair(pairs: Sequence[TokenizedPair], method: str, mode: str, batch: int, budget: int) -> float:
    """What a method would put through the model for a whole data set, padding included; nothing is run."""
    if method == "packed":
        return sum(cost(pair, mode == "eos") for pair in pairs) / len(pairs)
    answers = [(len(p.prompt_ids), max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs]
    if method == "trl":
        lengths = sorted(prompt + n for prompt, n in answers)
        parts = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
        return sum(2 * len(part) * part[-1] for part in parts) / len(pairs)
    lengths = [prompt + i for prompt, n in answers for i in range(1, n + 1)]
    every = batches_by_length(lengths, budget)
    return sum(2 * len(part) * lengths[part[-1]] for part in every) / len(pairs)


def default_data() -> Path:
    """The pairs of shared/data that reward models are trained on.

    Raises:
        RGTGError: they are not there.
    """
    folder = Path(os.environ.get("RGTG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / "hh_guide_train.jsonl.gz"
    if not path.is_file():
        raise RGTGError(
            f"{path.name} is not in RGTG_DATA: set it to its folder, or name preference pairs by --data"
        )
    return path


def draw(pairs: Sequence[TokenizedPair], limit: int, seed: int) -> list[TokenizedPair]:
    """`limit` pairs at random, in the order of the data."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:limit]
    return [pairs[i] for i in sorted(order.tolist())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def measure(job: Job, given: argparse.Namespace, progress: Callable[[str], None]) -> Iterator[Timed]:
    """Every method that is wanted, in turn."""
    if "packed" in given.methods:
        for mode in ("eos", "hold"):
            yield time_packed(job, mode)
    if "one_row_per_prefix" in given.methods:
        yield time_one_row_per_prefix(job, given.batches)
    if "trl" in given.methods:
        tried = []
        for batch in TRL_BATCHES:
            tried.append(time_trl(job, batch))
            progress(f"    trl, batches of {batch} pairs: {len(job.pairs) / tried[-1].seconds:.3f} pairs/s")
        yield min(tried, key=lambda timed: timed.seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="path or hub id (default: the embedded SmolLM2)")
    parser.add_argument("--name", help="name of the model in the file")
    parser.add_argument("--data", type=Path, help="preference pairs (default: hh_guide_train of RGTG_DATA)")
    parser.add_argument("--limit", type=int, default=20, help="pairs, drawn at random")
    parser.add_argument("--batches", type=int, default=8, help="batches of one row per prefix that are timed")
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens of a row or batch")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of a prompt with its longer answer"
    )
    parser.add_argument("--full", action="store_true", help="train all weights, not LoRA of rank 16")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "train.csv")
    given = parser.parse_args(arguments)
    # Every method loads the model, each time with the same report about its score head.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        rows = run(given)
        append(given.output, rows, COLUMNS)
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(rows)} rows: {given.output}")
    return 0


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the results file."""
    data = given.data or default_data()
    source = given.model or str(embedded.default_model(print))
    name = given.name or (Path(source).name if given.model else embedded.NAME)
    raw, _ = load_pairs(data)
    tokenizer = AutoTokenizer.from_pretrained(source)
    every, report = tokenize_pairs(raw, tokenizer, max_length=given.max_length, chat=True)
    pairs = draw(every, given.limit, given.seed)
    job = Job(pairs, source, DTYPES[given.dtype], given.full, given.device, given.token_budget, given.seed)
    print(f"{len(pairs)} of {report.kept} pairs of {data.name}")
    loss_difference, gradient_difference = check(job, every)
    print(
        f"packed = one row per prefix: loss {loss_difference:.1g}, gradient {gradient_difference:.1g} apart"
    )
    here = machine(given.device)
    common = {column: here[column] for column in MACHINE} | {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "trl": _version("trl"),
        "peft": _version("peft"),
        "model": name,
        "device": given.device,
        "dtype": given.dtype,
        "tuning": "full" if given.full else "lora-16",
        "data": data.name,
        "max_length": given.max_length,
        "pairs": len(pairs),
        "seed": given.seed,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "token_budget": given.token_budget,
        "data_pairs": len(every),
    }
    rows = []
    for timed in measure(job, given, print):
        whole = tokens_per_pair(
            every, timed.method, timed.mode, round(timed.pairs_per_batch) or 1, given.token_budget
        )
        compared = timed.mode == "eos"
        row = common | {
            "method": timed.method,
            "mode": timed.mode,
            "pairs_per_batch": timed.pairs_per_batch,
            "tokens_per_pair": timed.tokens / len(pairs),
            "filled": timed.real_tokens / timed.tokens,
            "seconds": timed.seconds,
            "pairs_per_second": len(pairs) / timed.seconds,
            "tokens_per_second": timed.tokens / timed.seconds,
            "time_is": timed.time_is,
            "loss_difference": loss_difference if compared else None,
            "gradient_difference": gradient_difference if compared else None,
            "data_tokens_per_pair": whole,
        }
        rows.append({column: shown(row[column]) for column in COLUMNS})
        print(
            f"{timed.method:18} {timed.mode:5} {row['pairs_per_second']:9.4f} pairs/s "
            f"{row['tokens_per_pair']:9.0f} tokens/pair {row['tokens_per_second']:7.0f} tokens/s  {timed.time_is}"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
