"""`transformers serve` of a guided folder, asked by the openai client: the answers of `RewardGuidedDecoder`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rgtg_fast import Guidance, RewardGuidedDecoder

openai = pytest.importorskip("openai", reason="needs transformers[serving]")
pytest.importorskip("fastapi", reason="needs transformers[serving]")
pytest.importorskip("uvicorn", reason="needs transformers[serving]")

CHAT = [{"role": "user", "content": "How do I learn to swim?"}]
NEW = 24
STARTS = 300  # seconds after which a server counts as one that does not start


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = str(tmp_path_factory.mktemp("guided") / "smollm2-guided")
    command = ["export", "--output", target, "--k", "8", "--beta", "8", "--temperature", "1"]
    subprocess.run([sys.executable, "-m", "rgtg_fast", *command], check=True)
    return target


@pytest.fixture(scope="module")
def address(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, *settings]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + STARTS
        while time.monotonic() < end:
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.model
def test_answers_are_the_decoders(folder: str, address: str) -> None:
    """Whole and streamed; a request that guided decoding refuses is an error, and the server goes on."""
    client = openai.OpenAI(base_url=address, api_key="none")
    decoder = RewardGuidedDecoder.from_pretrained(folder, "bundled:pargs")
    guided = decoder.generate([CHAT], max_new_tokens=NEW, guidance=Guidance(8, 8.0, 0))[0].text
    unguided = decoder.generate([CHAT], max_new_tokens=NEW, guidance=Guidance(8, 0.0, 0))[0].text
    assert guided != unguided
    call = {"model": folder, "messages": CHAT, "max_tokens": NEW}
    greedy = {**call, "temperature": 0}

    def answer(**request: Any) -> str | None:
        return client.chat.completions.create(**request).choices[0].message.content

    assert answer(**greedy) == guided
    chunks = client.chat.completions.create(**greedy, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == guided
    word = guided.split()[4]
    assert answer(**greedy, stop=[word]) == guided[: guided.index(word) + len(word)]
    assert answer(**call, seed=3) == answer(**call, seed=3) != answer(**call, seed=4)
    with pytest.raises(openai.APIError):
        client.chat.completions.create(**call, top_p=0.5)
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**call, top_p=0.5, stream=True))
    assert answer(**greedy) == guided
