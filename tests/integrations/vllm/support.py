"""Tiny models that vLLM can serve, a server with its log, and an engine in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import make_lm, make_rm, make_tokenizer

ROOT = Path(__file__).parents[3]
PROCESSOR = "rgtg_fast.integrations.vllm:RewardGuide"
# vLLM's attention on a CPU takes heads of 32 and blocks of a multiple of 32 tokens.
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
# Seconds for a server to start, far more than it takes: only a server that hangs reaches it.
PATIENCE = 300


def save_models(folder: Path) -> dict[str, str]:
    """Saves a base model and a reward model of each kind; returns their paths by name."""
    tokenizer = make_tokenizer()
    models = {
        "lm": make_lm(0, **SHAPE),
        "sequence": make_rm(1, max_position_embeddings=512),
        "genarm": make_lm(2, max_position_embeddings=512),
        "farma": make_lm(3, max_position_embeddings=512),
        "short": make_rm(1, max_position_embeddings=64),
        "smaller": make_lm(2, vocab_size=48),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def environment(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """The environment of a server with these settings, which are written to a file."""
    path = folder / "guide.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return {**os.environ, **ENVIRONMENT, "RGTG_FAST_CONFIG": str(path)}


class Server:
    """A running server.

    Attributes:
        url: of its API.
        model: name of the model it serves.
        log: file of what it writes.
    """

    def __init__(self, port: int, model: str, log: Path):
        self.url, self.model, self.log = f"http://127.0.0.1:{port}", model, log

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
        """Status and body of an answer."""
        data = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def tokens(self, prompt: list[int], count: int, xargs: dict[str, Any] | None = None) -> list[int]:
        """The greedy answer to a prompt of token ids."""
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
        status, answer = self.post(body | ({} if xargs is None else {"vllm_xargs": xargs}))
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


def command(model: str, *options: str) -> list[str]:
    """Starts a server in float32 (the `vllm` command of vllm-cpu 0.32 does not find its own version)."""
    fixed = ["--enforce-eager", "--dtype", "float32", "--generation-config", "vllm", "--block-size", "32"]
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*module, "--model", model, "--logits-processors", PROCESSOR, *fixed, *options]


@contextlib.contextmanager
def serving(model: str, settings: dict[str, Any], folder: Path, *options: str) -> Iterator[Server]:
    """A server while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    arguments = [*command(model, "--host", "127.0.0.1", "--port", str(port)), *options]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            arguments, env=environment(settings, folder), stdout=out, stderr=out, start_new_session=True
        )
    try:
        server = Server(port, model, log)
        _wait(process, server)
        yield server
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, server.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server after {PATIENCE} s: {server.log.read_text()[-3000:]}")


def run_engine(job: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `engine.py` says about a job, from a process of its own."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.vllm.engine", str(folder / "job.json")],
        env=environment(settings, folder) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (folder / "result.json").exists(), done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text()) | {"log": done.stdout + done.stderr}
