"""The example answers as `RewardGuidedDecoder` does, with SmolLM2 and the bundled reward model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `bash tests/integrations/run vllm`")

from rgtg_fast import Guidance, RewardGuidedDecoder
from tests.integrations.vllm.support import ENVIRONMENT, PATIENCE, ROOT

QUESTION = "How do I learn to swim?"


def test_the_example_gives_the_decoders_answers(smollm2: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "vllm_serve.sh"), QUESTION],
        env={**os.environ, **ENVIRONMENT, "PORT": port, "PATH": path},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    decoder = RewardGuidedDecoder.from_pretrained(smollm2, reward="bundled:pargs", dtype="float32")
    chat = [{"role": "user", "content": QUESTION}]
    for text, guidance in zip(
        texts, [Guidance(k=10, beta=2.0, temperature=0), Guidance(k=1, temperature=0)], strict=True
    ):
        assert text.strip() == decoder.generate([chat], 32, guidance)[0].text.strip()
    assert texts[0] != texts[1]
