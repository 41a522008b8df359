"""Steps on a GPU that run without the host: captured, one ahead, compiled, and never waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward
from rgtg_fast.models.fused_projections import FusedLinear
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of
from tests.engine.test_ahead import GUIDES, SUPPORTS, as_numbers
from tests.models.adapters import write_adapter

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: captured steps are NOT run on a GPU"
)
TOKENIZER = make_tokenizer()


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_decoder(guide: str, graphs: bool | None = None, device: str = "cuda", **settings: object):
    model = make_lm()
    model.generation_config.eos_token_id = [1, *range(8, 64, 7)]
    return RewardGuidedDecoder.from_pretrained(
        (model, TOKENIZER),
        reward=GUIDES[guide](),
        device=device,
        dtype=settings.pop("dtype", "float32"),
        max_batch=3,
        graphs=graphs,
        **settings,
    )


def settings_of(temperature: float, support: str) -> list[Guidance]:
    return [Guidance(3 + i % 3, 1.0, temperature, support=support) for i in range(7)]


@pytest.mark.parametrize(("guide", "support"), SUPPORTS)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_graphs_give_the_tokens_of_the_eager_step_and_of_the_cpu(
    guide: str, support: str, temperature: float
) -> None:
    """Rows end, leave and are replaced; the second call replays what the first has captured."""
    prompts, guidance, seeds = prompts_of(7), settings_of(temperature, support), list(range(7))
    want = as_numbers(make_decoder(guide, device="cpu").generate(prompts, 9, guidance, seeds))
    eager = make_decoder(guide, graphs=False)
    assert as_numbers(eager.generate(prompts, 9, guidance, seeds)) == want
    eager.max_in_flight = 0
    assert as_numbers(eager.generate(prompts, 9, guidance, seeds)) == want
    graphed = make_decoder(guide)
    assert graphed.describe()["graphs"]
    first = graphed.generate(prompts, 9, guidance, seeds)
    second = graphed.generate(prompts, 9, guidance, seeds)
    assert as_numbers(first) == want
    assert as_numbers(second) == want
    assert first.stats.graph_seconds > 0
    assert second.stats.graph_seconds == 0


@pytest.mark.parametrize("guide", ["sequence", "contrastive", "genarm"])
def test_the_triton_engine_gives_the_tokens_of_the_models_own_blocks(guide: str) -> None:
    prompts, guidance, seeds = prompts_of(7), settings_of(0, "lm"), list(range(7))
    own, fused = (make_decoder(guide, engine=engine) for engine in ("transformers", "triton"))
    assert make_decoder(guide).describe()["lm_engine"] == "triton"
    want = [row.tokens for row in own.generate(prompts, 9, guidance, seeds)]
    assert [row.tokens for row in fused.generate(prompts, 9, guidance, seeds)] == want


@pytest.mark.parametrize(("guide", "support"), SUPPORTS)
@pytest.mark.parametrize("graphs", [None, False])
def test_the_host_never_waits_for_the_device(
    guide: str, support: str, graphs: bool | None, no_sync: None
) -> None:
    """Prompts are admitted, rows end and are replaced, all without one synchronisation."""
    decoder = make_decoder(guide, graphs)
    prompts, guidance, seeds = prompts_of(7), settings_of(0.9, support), list(range(7))
    want = decoder.generate(prompts, 9, guidance, seeds, trace=True)  # compiles and captures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    got = decoder.generate(prompts, 9, guidance, seeds, trace=True)
    assert as_numbers(got) == as_numbers(want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_replays_in_half_precision_give_the_tokens_of_the_eager_step(dtype: str) -> None:
    prompts, guidance = prompts_of(7), settings_of(0.9, "lm")
    want = make_decoder("sequence", graphs=False, dtype=dtype).generate(prompts, 9, guidance)
    got = make_decoder("sequence", dtype=dtype).generate(prompts, 9, guidance)
    assert as_numbers(got) == as_numbers(want)


@pytest.mark.parametrize("shares", [True, False])
def test_adapters_are_captured_too(shares: bool, tmp_path: Path) -> None:
    rows = []
    for graphs in (False, None):
        model = make_lm()
        guide = SequenceReward(write_adapter(tmp_path / "guide", model, fork=1), share_trunk=shares)
        decoder = RewardGuidedDecoder.from_pretrained(
            (model, TOKENIZER), guide, device="cuda", dtype="float32", max_batch=2, graphs=graphs
        )
        rows.append(as_numbers(decoder.generate(prompts_of(5), 8, Guidance(5), seed=list(range(5)))))
    assert rows[0] == rows[1]


def test_joined_products_give_the_same_tokens() -> None:
    rows = []
    for join in (False, None):
        decoder = make_decoder("sequence", fuse_projections=join)
        joined = [m for m in decoder.lm.runner.model.modules() if isinstance(m, FusedLinear)]
        assert bool(joined) is (join is None), "joined by default on CUDA"
        rows.append(as_numbers(decoder.generate(prompts_of(5), 9, Guidance(5, temperature=0))))
    assert rows[0] == rows[1]


def test_a_row_has_the_same_text_in_any_batch() -> None:
    decoder = make_decoder("sequence")
    prompts, seeds = prompts_of(6), list(range(6))
    together = decoder.generate(prompts, 9, Guidance(5), seeds)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        assert decoder.generate([prompt], 9, Guidance(5), seed)[0].tokens == row.tokens


def test_a_padded_batch_gives_a_row_the_same_bits_in_bfloat16() -> None:
    decoder = make_decoder("sequence", dtype="bfloat16", pad_batch=True)
    prompts, seeds = prompts_of(6), list(range(6))
    together = decoder.generate(prompts, 9, Guidance(5), seeds)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        alone = decoder.generate([prompt], 9, Guidance(5), seed)[0]
        assert (alone.tokens, alone.rewards, alone.logprobs) == (row.tokens, row.rewards, row.logprobs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("guide", ["sequence", "contrastive", "genarm"])
def test_batch_invariant_steps_give_a_row_the_same_bits(guide: str, dtype: str) -> None:
    decoder = make_decoder(guide, dtype=dtype, engine="triton", batch_invariant=True)
    prompts, seeds, guidance = prompts_of(7), list(range(7)), settings_of(0.9, "lm")
    together = decoder.generate(prompts, 9, guidance, seeds)
    for prompt, seed, each, row in zip(prompts, seeds, guidance, together, strict=True):
        alone = decoder.generate([prompt], 9, each, seed)[0]
        assert (alone.tokens, alone.rewards, alone.logprobs) == (row.tokens, row.rewards, row.logprobs)


def test_streams_and_stop_strings() -> None:
    prompt = prompts_of(1)[0]
    plain, graphed = make_decoder("sequence", device="cpu"), make_decoder("sequence")
    for decoder in (plain, graphed):
        decoder.lm.runner.model.generation_config.eos_token_id = []
    text = plain.generate(prompt, 12, Guidance(5), seed=3)[0].text
    for stop in (None, " ".join(text.split()[3:5])):
        want = [(p.text, p.token, p.finish_reason) for p in plain.stream(prompt, 12, Guidance(5), 3, stop)]
        got = [(p.text, p.token, p.finish_reason) for p in graphed.stream(prompt, 12, Guidance(5), 3, stop)]
        assert got == want


def test_the_tail_of_the_reward_model_is_one_launch() -> None:
    decoder = make_decoder("sequence")
    assert decoder.reward is not None
    assert decoder.reward.fused
    assert not make_decoder("rad").reward.fused


def test_memory_does_not_grow_from_call_to_call() -> None:
    decoder = make_decoder("sequence")
    prompts, guidance = prompts_of(7), settings_of(0.9, "lm")
    held = []
    for _ in range(4):
        decoder.generate(prompts, 9, guidance)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3]


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True])
def test_compiled_blocks_in_graphs_give_the_same_tokens(shares: bool, tmp_path: Path) -> None:
    tokenizer, rows = make_tokenizer(), []
    for compile in (False, True):
        model = make_lm()
        guide = SequenceReward(
            write_adapter(tmp_path / "guide", model, fork=1) if shares else (make_rm(), tokenizer)
        )
        decoder = RewardGuidedDecoder.from_pretrained(
            (model, tokenizer), guide, device="cuda", dtype="float32", max_batch=2, compile=compile
        )
        rows.append(as_numbers(decoder.generate(prompts_of(2), 9, Guidance(5, temperature=0))))
    assert rows[0] == rows[1]
