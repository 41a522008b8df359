"""Runs the whole study: `python -m benchmarks.study` trains the models that are missing, then evaluates.

Reward models, policies and judge are adapters of the embedded model. The judge's is larger, and trained on other data
than the reward models. Existing models and answers are kept, so that an interrupted run continues where it stopped. The
results go to benchmarks/study/results; `python -m benchmarks.report` puts their tables into the documentation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.study.archive import pack
from benchmarks.study.budgets import keep

HERE = Path(__file__).parent
MODELS, CONFIG, RESULTS = HERE / "models", HERE / "study.yaml", HERE / "results"
CONTROL = HERE / "control.yaml"
GUIDES, JUDGES = "hh_guide_train.jsonl.gz", "hh_judge_train.jsonl.gz"
ADAPTER = "--fork-layer 25 --lora-rank 8 --lora-alpha 16 --max-length 384 --epochs 1 --lr 5e-4 --bf16"
# A budget of some ten minutes each on two cores.
GUIDE = f"{ADAPTER} --limit 2000 --accumulate 4"
POLICY = f"{ADAPTER} --limit"
# For each model its data, and the command that trains it.
TRAINING = {
    "judge": (
        JUDGES,
        "train --objective full_bt --weight pair --fork-layer 20 --lora-rank 32 --lora-alpha 64 --max-length 384 "
        "--epochs 1 --lr 5e-4 --head-lr 1e-4 --head-fit 0.3 --accumulate 8 --bf16",
    ),
    "farma": (GUIDES, f"train --objective farma --head-fit 0.3 {GUIDE}"),
    "genarm": (GUIDES, f"train --objective genarm {GUIDE}"),
    # Their labels are rewards of `bundled:args`: with the judge's rewards, the judge would guide the decoding.
    "cd_fudge": (GUIDES, f"train --objective cd_fudge --judge bundled:args {GUIDE}"),
    "rad": (GUIDES, f"train --objective rad --judge bundled:args {GUIDE}"),
    "dpo": (GUIDES, f"train-policy --objective dpo {POLICY} 800"),
    "treg": (GUIDES, f"train-policy --objective treg {POLICY} 240"),
}
SHARED = HERE.parent.parent.parent / "shared" / "data"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, help="another study instead (default: the study and its control)"
    )
    parser.add_argument("--only", choices=("train", "evaluate"), help="one half of it")
    parser.add_argument("--limit", type=int, help="prompts at most")
    given = parser.parse_args(arguments)
    data = Path(os.environ.get("RGTG_DATA", SHARED))
    if not data.is_dir():
        print("the data folder is missing: set RGTG_DATA to it", file=sys.stderr)
        return 2
    environment = {**os.environ, "RGTG_DATA": str(data), "OMP_WAIT_POLICY": "PASSIVE"}
    commands = []
    if given.only != "evaluate":
        for name, (source, options) in TRAINING.items():
            if not any((MODELS / name).glob("*.safetensors")):
                commands.append(training(name, data / source, options))
    if given.only != "train":
        limit = [] if given.limit is None else ["--limit", str(given.limit)]
        configs = [CONFIG, CONTROL] if given.config is None else [given.config]
        commands += [["evaluate", "--config", str(config), *limit] for config in configs]
    for command in commands:
        print("rgtg-fast", *command, flush=True)
        done = subprocess.run([sys.executable, "-m", "rgtg_fast", *command], env=environment, check=False)
        if done.returncode:
            return done.returncode
    keep(MODELS, TRAINING, RESULTS)
    pack(RESULTS)
    return 0


def training(name: str, data: Path, options: str) -> list[str]:
    """The command that trains a model, or resumes its training."""
    command, *rest = options.split()
    resume = ["--resume"] if any((MODELS / name).glob("checkpoint-*")) else []
    return [command, "--data", str(data), "--output", str(MODELS / name), *rest, *resume]


if __name__ == "__main__":
    sys.exit(main())
