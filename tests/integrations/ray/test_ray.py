"""Ray itself: two actors on one machine give the answers of one decoder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray[data] is not installed: `bash tests/integrations/run ray`")

import ray
import ray.data

from rgtg_fast import Guidance, RewardGuidedDecoder
from rgtg_fast.integrations.ray import RewardGuidedPredictor
from tests.conftest import make_lm, make_rm, make_tokenizer

ROOT = Path(__file__).parents[3]
GUIDANCE = Guidance(k=4, beta=2.0, temperature=20.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {"lm": make_lm(), "reward": make_rm()}
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def answered(rows: list[dict[str, Any]], blocks: int, **settings: Any) -> list[dict[str, Any]]:
    data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        RewardGuidedPredictor,
        fn_constructor_kwargs={"guidance": GUIDANCE, "max_new_tokens": 8, **settings},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=3,
    )
    found = [{**row, "tokens": list(row["tokens"])} for row in data.take_all()]
    return sorted(found, key=lambda row: row["id"])


@pytest.mark.usefixtures("cluster")
def test_two_actors_answer_as_one_decoder_does(folders: dict[str, str]) -> None:
    rows = [{"id": at, "prompt": f"w{at} w{at + 1}", "seed": 100 - at} for at in range(16)]
    found = answered(rows, 5, **folders, seed_column="seed")
    assert found == answered(rows, 2, **folders, seed_column="seed")
    decoder = RewardGuidedDecoder.from_pretrained(**folders)
    wanted = decoder.generate(
        [row["prompt"] for row in rows], 8, GUIDANCE, seed=[row["seed"] for row in rows]
    )
    for row, expected in zip(found, wanted, strict=True):
        assert row["answer"] == expected.text
        assert row["tokens"] == expected.tokens
        assert row["reward"] == expected.reward
        assert row["finish_reason"] == expected.finish_reason
        assert row["error"] == ""


@pytest.mark.usefixtures("cluster")
def test_chats_go_through_and_bad_rows_keep_the_others(folders: dict[str, str]) -> None:
    chats = [[{"role": "user", "content": f"w{at}"}] for at in range(6)]
    chats[1] = [{"role": "user", "content": "w1 " * 200}]
    chats[4] = [{"role": "user", "content": None}]
    found = answered([{"id": at, "prompt": chat} for at, chat in enumerate(chats)], 3, **folders)
    assert [bool(row["error"]) for row in found] == [False, True, False, False, True, False]
    assert "201 tokens" in found[1]["error"] or "202 tokens" in found[1]["error"]
    good = [0, 2, 3, 5]
    decoder = RewardGuidedDecoder.from_pretrained(**folders)
    wanted = decoder.generate([chats[at] for at in good], 8, GUIDANCE)
    assert [found[at]["answer"] for at in good] == [row.text for row in wanted]


@pytest.mark.usefixtures("cluster")
def test_a_missing_model_ends_the_job_with_its_reason(folders: dict[str, str]) -> None:
    with pytest.raises(Exception, match="nowhere"):
        answered([{"id": 0, "prompt": "w1"}], 1, lm="/nowhere", reward=folders["reward"])


def test_the_example_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "examples/ray_answers.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    assert len([line for line in done.stdout.splitlines() if "': '" in line or '": ' in line]) == len(prompts)
