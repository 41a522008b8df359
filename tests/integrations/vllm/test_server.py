"""A real server and openai's client: guided answers, refusals in one line, and a server that lives on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `bash tests/integrations/run vllm`")

from openai import BadRequestError, OpenAI

from rgtg_fast import Guidance, RewardGuidedDecoder
from tests.integrations.vllm.support import PATIENCE, Server, command, environment, save_models, serving

PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15], list(range(6, 56))]
K, BETA = 4, 1.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"reward": models["sequence"], "k": K, "beta": BETA, "max_k": 20}
    options = ["--max-num-seqs", "4", "--max-model-len", "256", "--max-num-batched-tokens", "32"]
    with serving(models["lm"], settings, tmp_path_factory.mktemp("server"), *options) as running:
        yield running


@pytest.fixture(scope="module")
def decoder(models: dict[str, str]) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained(models["lm"], reward=models["sequence"], dtype="float32")


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)


def expected(
    decoder: RewardGuidedDecoder, prompt: list[int], count: int, k: int = K, beta: float = BETA
) -> list[int]:
    tokens = list(decoder.generate([prompt], count, Guidance(k=k, beta=beta, temperature=0))[0].tokens)
    return tokens if len(tokens) == count else [*tokens, 1]


def test_concurrent_requests_with_their_own_settings(server: Server, decoder: RewardGuidedDecoder) -> None:
    """Guided and unguided ones side by side, each with its own k and β."""
    cases: list[tuple[dict[str, Any] | None, int, float]] = [
        (None, K, BETA),
        ({"rgtg": 0}, 1, 0.0),
        ({"rgtg_beta": 3, "rgtg_k": 8}, 8, 3.0),
        ({"rgtg_beta": -0.5}, K, -0.5),
    ]
    jobs = [(prompt, *case) for prompt in PROMPTS for case in cases]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: server.tokens(job[0], 16, job[1]), jobs))
    for (prompt, _, k, beta), answer in zip(jobs, answers, strict=True):
        assert answer == expected(decoder, prompt, 16, k, beta)
    assert len({tuple(answer) for answer in answers[:4]}) > 1, "the settings were to make a difference"


def test_streams_side_by_side(client: OpenAI, server: Server, decoder: RewardGuidedDecoder) -> None:
    """openai's client reads two streams in turns."""

    def stream(xargs: dict[str, Any]) -> Any:
        return client.completions.create(
            model=server.model,
            prompt=PROMPTS[0],
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"vllm_xargs": xargs},
        )

    guided, unguided = stream({"rgtg_beta": 2.0}), stream({"rgtg": 0})
    texts = ["", ""]
    for chunks in zip_longest(guided, unguided):
        for which, chunk in enumerate(chunks):
            texts[which] += "" if chunk is None else chunk.choices[0].text
    assert decoder.tokenizer is not None
    for text, (k, beta) in zip(texts, [(K, 2.0), (1, 0.0)], strict=True):
        whole = decoder.tokenizer.decode(expected(decoder, PROMPTS[0], 12, k, beta), skip_special_tokens=True)
        assert text.split() == whole.split()


def test_several_answers_to_one_prompt(client: OpenAI, server: Server, decoder: RewardGuidedDecoder) -> None:
    """n=3: sampled answers consist of candidates alone."""
    answer = client.completions.create(
        model=server.model,
        prompt=PROMPTS[0],
        max_tokens=12,
        temperature=1.0,
        seed=5,
        n=3,
        extra_body={"return_token_ids": True, "vllm_xargs": {"rgtg_k": 2}},
    )
    rows: list[Any] = list(answer.choices)
    assert len(rows) == 3
    for tokens in (choice.token_ids for choice in rows):
        for at, token in enumerate(tokens):
            # The base model's two most probable tokens are the only candidates.
            prefix = [*PROMPTS[0], *tokens[:at]]
            row = decoder.generate([prefix], 1, Guidance(k=2, temperature=0), trace=True)[0]
            assert row.trace is not None
            assert token in [candidate.token for candidate in row.trace[0].candidates]
    assert len({tuple(choice.token_ids) for choice in rows}) > 1


def test_chat(client: OpenAI, server: Server, decoder: RewardGuidedDecoder) -> None:
    messages = [{"role": "user", "content": "w1 w2"}]
    answer = client.chat.completions.create(
        model=server.model,
        messages=messages,
        max_tokens=8,
        temperature=0,
        extra_body={"vllm_xargs": {"rgtg_k": 6}},
    )
    row = decoder.generate([messages], 8, Guidance(k=6, beta=BETA, temperature=0))[0]
    assert (answer.choices[0].message.content or "").split() == row.text.split()


REFUSED = {
    "rgtg_beta=nan-like": ({"rgtg_beta": "high"}, "rgtg_beta='high' is not a number"),
    "rgtg_k=0": ({"rgtg_k": 0}, "rgtg_k=0 is below 1"),
    "rgtg_k=1.5": ({"rgtg_k": 1.5}, "rgtg_k=1.5 is not a whole number"),
    "rgtg_k=21": ({"rgtg_k": 21}, "rgtg_k=21 is above 20"),
    "rgtg_support=half": ({"rgtg_support": "half"}, "rgtg_support='half' is unknown"),
    "rgtg_support=all": ({"rgtg_support": "all"}, "support='all' needs a reward over the whole vocabulary"),
    "rgtg_weights": ({"rgtg_weights": [1.0, 2.0]}, "mixes 0 rewards"),
    "rgtg_gate_entropy": ({"rgtg_gate_entropy": -1}, "rgtg_gate_entropy=-1.0 is below 0"),
    "rgtg_temperature": ({"rgtg_temperature": 1}, "'rgtg_temperature' is unknown"),
    "rgtg": ({"rgtg": "maybe"}, "rgtg='maybe' is neither true nor false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused_in_one_line(
    case: str, client: OpenAI, server: Server, decoder: RewardGuidedDecoder
) -> None:
    xargs, message = REFUSED[case]
    with pytest.raises(BadRequestError, match="400") as error:
        client.completions.create(
            model=server.model, prompt=PROMPTS[0], max_tokens=4, extra_body={"vllm_xargs": xargs}
        )
    said = error.value.body["message"]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    assert message in said
    assert "\n" not in said
    assert server.tokens(PROMPTS[0], 4) == expected(decoder, PROMPTS[0], 4)


@pytest.mark.parametrize("body", [{"prompt": [7] * 300}, {"use_beam_search": True, "n": 2, "prompt": [7, 8]}])
def test_other_requests_that_cannot_be_guided(
    body: dict[str, Any], server: Server, decoder: RewardGuidedDecoder
) -> None:
    """A prompt beyond the context of both models, and beams, which rank without the reward."""
    status, answer = server.post({"max_tokens": 4, **body})
    assert status == 400
    assert "\n" not in answer["error"]["message"]
    assert ("beam search" if "n" in body else "256") in answer["error"]["message"]
    assert server.tokens(PROMPTS[0], 4) == expected(decoder, PROMPTS[0], 4)


def test_clients_that_go_away(client: OpenAI, server: Server, decoder: RewardGuidedDecoder) -> None:
    """200 streams of which half are left after their first chunk."""

    def one(number: int) -> None:
        stream = client.completions.create(
            model=server.model, prompt=PROMPTS[number % 4], max_tokens=6, temperature=0, stream=True
        )
        for _ in stream:
            if number % 2:
                stream.close()
                return

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(200)))
    assert server.tokens(PROMPTS[0], 16) == expected(decoder, PROMPTS[0], 16)


def test_a_server_that_cannot_guide_does_not_start(models: dict[str, str], tmp_path: Path) -> None:
    """Its log has the reason in one line; tests/integrations/vllm/test_rows.py has further reasons."""
    settings = {"reward": models["sequence"], "beta": "much"}
    done = subprocess.run(
        command(models["lm"], "--port", "0", "--max-model-len", "128"),
        env=environment(settings, tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "rgtg_fast: " in line]
    assert "beta='much' is not a number" in line
