"""The public API: batches, ends of rows, seeds, traces, streams, what is refused, and what it costs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import (
    ContrastiveReward,
    FunctionReward,
    Guidance,
    RewardGuidedDecoder,
    RewardNaNError,
    RGTGError,
    SequenceReward,
)
from rgtg_fast.ops._extension import instruction_set
from rgtg_fast.profiling import PhaseTimer
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.naive import guided_greedy
from tests.engine.support import prompts_of

GREEDY = Guidance(k=5, beta=1.0, temperature=0)


def make_decoder(reward: Any = "rm", max_batch: int = 8, **settings: Any) -> RewardGuidedDecoder:
    tokenizer = make_tokenizer()
    if reward == "rm":
        reward = SequenceReward((make_rm(), tokenizer))
    return RewardGuidedDecoder.from_pretrained(
        (make_lm(), tokenizer), reward=reward, max_batch=max_batch, **settings
    )


@pytest.fixture(params=["auto", "transformers"])
def decoder(request: pytest.FixtureRequest) -> RewardGuidedDecoder:
    return make_decoder(engine=request.param)


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "beta"), [(1, 1.0), (5, 1.0), (5, -2.0), (64, 3.0)])
def test_greedy_equals_the_naive_algorithm(decoder: RewardGuidedDecoder, k: int, beta: float) -> None:
    prompts = prompts_of(5)
    rows = decoder.generate(prompts, 10, Guidance(k=k, beta=beta, temperature=0))
    for prompt, row in zip(prompts, rows, strict=True):
        lm, rm = decoder.lm.runner.model, decoder.reward.runner.model
        assert row.tokens == guided_greedy(lm, rm, prompt, k, beta, 10, eos=1)


def test_a_row_depends_on_itself_alone(decoder: RewardGuidedDecoder) -> None:
    prompts = prompts_of(12)
    seeds = list(range(12))
    guides = [Guidance(k=3 + i % 5, beta=0.5 * (i % 3), temperature=(0, 0.7, 1.3)[i % 3]) for i in range(12)]
    alone = [decoder.generate([p], 14, g, s)[0] for p, g, s in zip(prompts, guides, seeds, strict=True)]
    order = list(range(12))
    for shuffle in range(3):
        random.Random(shuffle).shuffle(order)
        rows = decoder.generate(
            [prompts[i] for i in order], 14, [guides[i] for i in order], [seeds[i] for i in order]
        )
        for i, row in zip(order, rows, strict=True):
            assert row.tokens == alone[i].tokens
            assert row.finish_reason == alone[i].finish_reason
            assert row.rewards == pytest.approx(alone[i].rewards, abs=1e-4)


def test_max_batch_changes_nothing() -> None:
    prompts = prompts_of(9)
    texts = [
        [row.tokens for row in make_decoder(max_batch=n).generate(prompts, 10, Guidance(k=5), seed=4)]
        for n in (1, 2, 8, 20)
    ]
    assert texts[1:] == texts[:-1]


def test_another_seed_is_another_text(decoder: RewardGuidedDecoder) -> None:
    rows = decoder.generate([[9, 8, 7]] * 6, 12, Guidance(k=10), seed=list(range(6)))
    assert len({tuple(row.tokens) for row in rows}) > 1
    again = decoder.generate([[9, 8, 7]] * 2, 12, Guidance(k=10), seed=3)
    assert again[0].tokens == again[1].tokens == rows[3].tokens


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_a_step_costs_b_tokens_and_b_times_k_tokens(
    decoder: RewardGuidedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where tokens enter the models, not by our own counters."""
    seen: dict[str, list[tuple[int, int]]] = {"lm": [], "rm": []}
    for name, runner in (("lm", decoder.lm.runner), ("rm", decoder.reward.runner)):
        forward = runner.layers.forward

        def counted(ids: torch.Tensor, *args: Any, name: str = name, forward: Any = forward) -> torch.Tensor:
            seen[name].append(tuple(ids.shape))
            return forward(ids, *args)

        monkeypatch.setattr(runner.layers, "forward", counted)
    prompts = [[7, 8, 9, 10], [11, 12], [13, 14, 15]]
    decoder.lm.runner.model.generation_config.eos_token_id = None
    result = decoder.generate(prompts, 6, Guidance(k=7, beta=0.3))
    prefills = len(prompts)
    assert sorted(seen["lm"][:prefills]) == sorted((1, len(p) - 1) for p in prompts)
    assert sorted(seen["rm"][:prefills]) == sorted((1, len(p)) for p in prompts)
    steps = result.stats.steps
    assert seen["lm"][prefills:] == [(3, 1)] * steps
    assert seen["rm"][prefills:] == [(3, 7)] * steps
    stats = result.stats
    assert (stats.lm_calls, stats.reward_calls) == (steps, steps)
    assert (stats.lm_tokens, stats.reward_tokens) == (3 * steps, 3 * 7 * steps)
    assert stats.prompt_tokens_lm == sum(len(p) - 1 for p in prompts)
    assert stats.prompt_tokens_reward == sum(map(len, prompts))


def test_finished_rows_leave_and_waiting_prompts_take_their_place() -> None:
    decoder = make_decoder(max_batch=3)
    prompts = prompts_of(10)
    result = decoder.generate(prompts, 12, Guidance(k=64, beta=0, temperature=50), seed=list(range(10)))
    lengths = [len(row.tokens) + (row.finish_reason == "eos") for row in result]
    assert len(set(lengths)) > 1  # otherwise nothing was tested
    assert result.stats.tokens == sum(lengths) == result.stats.lm_tokens
    assert result.stats.steps < sum(max(lengths[i : i + 3]) for i in range(0, 10, 3)) + max(lengths)


def test_samples_of_one_prompt_are_encoded_once(decoder: RewardGuidedDecoder) -> None:
    prompts = [[7, 8, 9, 10], [11, 12]] * 9
    guidance = Guidance(k=64, beta=0.3, temperature=50)
    alone = [decoder.generate([p], 12, guidance, seed=i)[0] for i, p in enumerate(prompts)]
    assert len({len(row.tokens) for row in alone}) > 2  # slots are freed, moved and filled again at any time
    together = decoder.generate(prompts, 12, guidance, seed=list(range(18)))
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert [row.rewards for row in together] == [pytest.approx(row.rewards, abs=1e-5) for row in alone]
    assert together.stats.prompt_tokens_lm < 9 * (3 + 1) / 3
    same = decoder.generate(prompts[:1] * 18, 12, guidance, seed=list(range(18))).stats
    assert (same.prompt_tokens_lm, same.prompt_tokens_reward) == (3, 4)


def test_cache_is_one_prefix_per_row_and_not_per_candidate() -> None:
    decoder = make_decoder()
    per_k = {}
    for k in (5, 40):
        per_k[k] = decoder.generate([[5] * 60], 40, Guidance(k=k, temperature=0)).stats.cache_bytes["reward"]
    bytes_per_token = decoder.reward.row_bytes(1)
    assert per_k[40] - per_k[5] == 35 * bytes_per_token  # only the undecided tokens grow with k
    assert per_k[5] == (60 + 40 + 5) * bytes_per_token


def test_contrastive_prompts_are_rows_of_the_base_models_batch() -> None:
    decoder = make_decoder(ContrastiveReward("w1 w2", "w3"))
    decoder.lm.runner.model.generation_config.eos_token_id = None
    stats = decoder.generate(prompts_of(4), 5, Guidance(k=6)).stats
    assert stats.lm_tokens == 4 * 5 * 3
    assert (stats.reward_calls, stats.reward_tokens) == (0, 0)


# ---- ends ------------------------------------------------------------------------------------------------------------


def _forced(sequence: list[int]) -> FunctionReward:
    """A guide that makes the answer the given ids, whatever the base model wants."""

    def reward(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([sequence[(len(p) - 2) % len(sequence)] for p in prefix_ids]).unsqueeze(-1)
        return torch.where(candidates == wanted, 1e4, 0.0)

    return FunctionReward(reward)


FORCE = Guidance(k=64, beta=1.0, temperature=0)


def test_eos_ends_a_row_and_is_scored_as_a_token() -> None:
    row = make_decoder(_forced([10, 11, 1])).generate([[8, 9]], 9, FORCE, trace=True)[0]
    assert row.tokens == [10, 11]
    assert row.finish_reason == "eos"
    assert row.text == "w4 w5"
    assert len(row.logprobs) == len(row.rewards) == 2
    assert [step.token for step in row.trace] == [10, 11, 1]
    assert row.reward == 1e4


def test_stop_strings_end_a_row_and_are_cut() -> None:
    decoder = make_decoder(_forced([10, 11, 12, 13]))
    row = decoder.generate([[8, 9]], 9, FORCE, stop=["w6", "never"])[0]
    assert row.finish_reason == "stop"
    assert row.text == "w4 w5 "
    assert row.tokens == [10, 11, 12]
    assert decoder.generate([[8, 9]], 9, FORCE, stop="w5 w6")[0].text == "w4 "


def test_length_ends_a_row() -> None:
    row = make_decoder(_forced([10, 11])).generate([[8, 9]], 3, FORCE)[0]
    assert (row.finish_reason, row.tokens, row.text) == ("length", [10, 11, 10], "w4 w5 w4")


@pytest.mark.parametrize("stop", [None, "w5 w6"])
def test_a_stream_is_the_row_in_pieces(stop: str | None) -> None:
    decoder = make_decoder(_forced([10, 11, 13, 11, 12, 14, 1]))
    whole = decoder.generate([[8, 9]], 20, FORCE, stop=stop)[0]
    pieces = list(decoder.stream([8, 9], 20, FORCE, stop=stop))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]
    assert [p.token for p in pieces if p.token != 1] == whole.tokens
    assert all(len(piece.candidates) == 64 for piece in pieces)


def test_iterate_gives_rows_as_they_finish() -> None:
    decoder = make_decoder(max_batch=4)
    prompts = prompts_of(8)
    seen = list(decoder.iterate(prompts, 12, Guidance(k=8, beta=0.5), seed=list(range(8))))
    assert sorted(index for index, _ in seen) == list(range(8))
    whole = decoder.generate(prompts, 12, Guidance(k=8, beta=0.5), seed=list(range(8)))
    assert {index: row.tokens for index, row in seen} == {row.index: row.tokens for row in whole}


def test_an_iterator_that_another_call_overtook_says_so() -> None:
    decoder = make_decoder(max_batch=1)
    rows = decoder.iterate([[5, 6], [7, 8]], 4, GREEDY)
    next(rows)
    decoder.generate([[9]], 2, GREEDY)
    with pytest.raises(RGTGError, match="called again before the run had finished"):
        list(rows)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_strings_chats_and_ids_are_prompts(decoder: RewardGuidedDecoder) -> None:
    chat = [{"role": "user", "content": "w1 w2"}]
    as_ids = decoder.tokenizer("<user> w1 w2 <assistant>")["input_ids"]
    rows = decoder.generate([chat, as_ids, "<user> w1 w2 <assistant>"], 6, GREEDY)
    assert rows[0].tokens == rows[1].tokens == rows[2].tokens
    assert decoder.generate(chat, 6, GREEDY)[0].tokens == rows[0].tokens
    assert decoder.generate("w1 w2", 6, GREEDY)[0].prompt == "w1 w2"


def test_a_reward_model_may_have_its_own_prompt_format() -> None:
    tokenizer = make_tokenizer()
    own = make_tokenizer("<system> w9 {% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>")
    rm = make_rm()
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=SequenceReward((rm, own)))
    chat = [{"role": "user", "content": "w1 w2"}]
    rm_ids = tokenizer("<system> w9 <user> w1 w2 <assistant>")["input_ids"]
    row = decoder.generate(chat, 4, GREEDY)[0]
    text, rewards = list(rm_ids), []
    for token in row.tokens:
        text.append(token)
        hidden = rm.base_model(torch.tensor([text]), use_cache=False).last_hidden_state[0, -1]
        rewards.append(rm.score(hidden).item())
    assert row.rewards == pytest.approx(rewards, abs=1e-4)
    assert decoder.score([chat], [row.tokens])[0] == pytest.approx(rewards, abs=1e-4)


# ---- traces and scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["lm", "combined", "all"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_trace_tells_why(support: str, temperature: float) -> None:
    decoder = make_decoder(ContrastiveReward("w1 w2", "w3"))
    row = decoder.generate([[9, 10, 11]], 5, Guidance(6, 1.5, temperature, support), trace=True, seed=2)[0]
    for position, step in enumerate(row.trace):
        assert step.position == position
        chosen = [c for c in step.candidates if c.chosen]
        assert len(step.candidates) == 6
        if support != "all" or temperature == 0:
            assert [c.token for c in chosen] == [step.token]
        total = sum(c.probability for c in step.candidates)
        assert total <= 1 + 1e-5 if support == "all" else total == pytest.approx(1, abs=1e-5)
        assert step.entropy >= 0
        if position < len(row.tokens) and chosen:
            assert chosen[0].logprob == pytest.approx(row.logprobs[position])
            assert chosen[0].reward == pytest.approx(row.rewards[position])


def test_base_token_is_the_choice_without_guidance(decoder: RewardGuidedDecoder) -> None:
    for temperature in (0, 1.0):
        guided = decoder.generate([[9, 10, 11]], 1, Guidance(8, 3.0, temperature), seed=11, trace=True)[0]
        base = decoder.generate([[9, 10, 11]], 1, Guidance(8, 0.0, temperature), seed=11, trace=True)[0]
        assert guided.trace[0].base_token == base.trace[0].token == base.trace[0].base_token


def test_scores_are_the_rewards_of_decoding(decoder: RewardGuidedDecoder) -> None:
    prompts = prompts_of(3)
    rows = decoder.generate(prompts, 6, GREEDY)
    for row, scores in zip(rows, decoder.score(prompts, [row.tokens for row in rows]), strict=True):
        assert row.rewards == pytest.approx(scores, abs=1e-4)
    contrastive = make_decoder(ContrastiveReward("w1 w2", "w3"))
    row = contrastive.generate("w4 w5", 6, GREEDY)[0]
    assert contrastive.score(["w4 w5"], [row.tokens])[0] == pytest.approx(row.rewards, abs=1e-4)
    ids = contrastive.tokenizer("w6 w7")["input_ids"]
    assert contrastive.score(["w4 w5"], ["w6 w7"]) == contrastive.score(["w4 w5"], [ids])
    assert row.reward is not None
    if row.finish_reason != "eos":
        assert row.reward == pytest.approx(sum(row.rewards))


def test_combined_and_all_are_the_formula() -> None:
    """One step over the whole vocabulary, from the three rows' uncached logits."""
    decoder = make_decoder(ContrastiveReward("w1 w2", "w3"))
    model, tokenizer = decoder.lm.runner.model, decoder.tokenizer
    with torch.inference_mode():
        base, better, worse = (
            model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].log_softmax(-1)
            for text in ("w4 w5", "w1 w2\n\nw4 w5", "w3\n\nw4 w5")
        )
    score = base + 2.0 * (better - worse)
    for support in ("combined", "all"):
        step = decoder.generate("w4 w5", 1, Guidance(4, 2.0, 0, support), trace=True)[0].trace[0]
        assert step.token == int(score.argmax())
    step = decoder.generate("w4 w5", 1, Guidance(4, 2.0, 1.0, "combined"), trace=True)[0].trace[0]
    assert {c.token for c in step.candidates} == set(score.topk(4).indices.tolist())
    rows = decoder.generate(["w4 w5"] * 3, 3, [Guidance(4, 2.0, 0, s) for s in ("lm", "all", "combined")])
    assert rows[1].tokens[0] == rows[2].tokens[0] == int(score.argmax())


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ({"prompts": []}, "there is no prompt"),
    ({"prompts": ""}, "prompt 0 is empty"),
    ({"prompts": ["w1", ""]}, "prompt 1 is empty"),
    ({"prompts": [[5], []]}, "prompt 1 is empty"),
    ({"prompts": [3.5]}, "prompt 0 is 3.5: pass"),
    ({"prompts": [[5, 64]]}, "token id 64, outside the vocabulary (V=64)"),
    ({"prompts": [[5] * 120]}, "max_new_tokens <= 8"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    ({"max_new_tokens": 500}, "exceed its 128"),
    ({"guidance": Guidance(k=65)}, "k=65 exceeds the vocabulary (V=64)"),
    ({"guidance": [GREEDY, GREEDY]}, "2 values of guidance for 1 prompts"),
    ({"guidance": 3}, "guidance"),
    ({"guidance": Guidance(support="all")}, "support='all' needs a reward over the whole vocabulary"),
    ({"guidance": Guidance(support="combined")}, "support='combined' needs"),
    ({"seed": [1, 2]}, "2 values of seed for 1 prompts"),
    ({"seed": 2**64}, "seed=18446744073709551616"),
    ({"stop": ""}, "stop=''"),
    ({"stop": [3]}, "stop=3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_line(arguments: dict[str, Any], message: str) -> None:
    decoder = make_decoder()
    with pytest.raises(RGTGError) as error:
        decoder.generate(**{"prompts": "w1", "max_new_tokens": 20, "guidance": GREEDY, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert decoder.generate("w1", 2, GREEDY)[0].tokens  # it still works


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0 is below 1"),
        ({"k": 2.5}, "k=2.5"),
        ({"k": True}, "k=True"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"beta": float("inf")}, "beta=inf"),
        ({"beta": "big"}, "beta='big'"),
        ({"support": "none"}, "support='none'"),
    ],
)
def test_guidance_validates_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RGTGError, match=message.replace("(", r"\(")):
        Guidance(**settings)


def test_a_nan_reward_names_row_step_and_token_and_keeps_finished_rows() -> None:
    def reward(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(candidates.shape)
        for row, prefix in enumerate(prefix_ids):
            if prefix[0] == 40 and len(prefix) == 2 + 3:
                out[row, 2] = torch.nan
        return out

    decoder = make_decoder(reward, max_batch=2)
    prompts = [[20, 21], [22, 23], [40, 41], [24, 25]]
    for _ in range(2):
        with pytest.raises(RewardNaNError) as error:
            decoder.generate(prompts, 8, Guidance(k=4, temperature=0))
        assert (error.value.row, error.value.step) == (2, 3)
        assert f"prompt 2, step 3, candidate token {error.value.token}" in str(error.value)
        assert {row.index for row in error.value.finished} == {0, 1}
    seen = []
    rows = decoder.iterate(prompts, 8, Guidance(k=4, temperature=0))
    with pytest.raises(RewardNaNError):
        seen.extend(index for index, _ in rows)
    assert set(seen) == {0, 1}


def test_rewards_of_minus_infinity_forbid_and_no_candidate_at_all_is_said() -> None:
    forbid = make_decoder(lambda prefix, ids: torch.where(ids % 2 == 0, 0.0, -torch.inf))
    assert all(token % 2 == 0 for token in forbid.generate([[9]], 12, Guidance(k=64))[0].tokens)
    nothing = make_decoder(lambda prefix, ids: torch.full(ids.shape, -torch.inf))
    with pytest.raises(RGTGError, match="no candidate of prompt 0, step 0 has a finite score"):
        nothing.generate([[9]], 3, Guidance(k=3))


def test_a_function_of_the_wrong_shape() -> None:
    with pytest.raises(RGTGError, match=r"returned shape \(1,\) for candidates of shape \(1, 5\)"):
        make_decoder(lambda prefix, ids: torch.zeros(len(ids))).generate("w1", 2, GREEDY)


def test_no_memory_says_which_batch_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(max_batch=8)
    one_row = 2 * decoder.lm.runner.cache.row_bytes(3 + 5)
    monkeypatch.setattr("rgtg_fast.engine.scheduler.free_bytes", lambda device: 3 * one_row + 7)
    with pytest.raises(RGTGError, match="max_batch=3 would fit"):
        decoder.generate([[7, 8, 9]] * 8, 5, GREEDY)
    assert decoder.generate([[7, 8, 9]] * 3, 5, GREEDY)[2].tokens
    monkeypatch.setattr("rgtg_fast.engine.scheduler.free_bytes", lambda device: 5)
    with pytest.raises(RGTGError, match="not even one row fits"):
        make_decoder().generate([[7, 8, 9]], 5, GREEDY)


def test_settings_of_the_decoder() -> None:
    for bad in (0, 1.5, True):
        with pytest.raises(RGTGError, match="max_batch"):
            make_decoder(max_batch=bad)
    with pytest.raises(RGTGError, match="max_length=1"):
        make_decoder(max_length=1)
    with pytest.raises(RGTGError, match="has no reward to score with"):
        make_decoder(None).score(["w1"], ["w2"])
    with pytest.raises(RGTGError, match="1 answers for 2 prompts"):
        make_decoder().score(["w1", "w2"], ["w2"])
    with pytest.raises(RGTGError, match="answer 0 is empty"):
        make_decoder().score(["w1"], [""])
    with pytest.raises(RGTGError, match="without a tokenizer"):
        RewardGuidedDecoder.from_pretrained((make_lm(), None)).generate("w1")
    assert RewardGuidedDecoder.from_pretrained((make_lm(), None)).generate([[5]], 3, GREEDY)[0].text


# ---- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    k=st.sampled_from([1, 2, 7, 63, 64]),
    beta=st.sampled_from([-1.0, 0.0, 2.0]),
    temperature=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    new_tokens=st.integers(1, 6),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_ragged_batch_decodes(
    lengths: list[int], k: int, beta: float, temperature: float, new_tokens: int, seed: int
) -> None:
    decoder = make_decoder(max_batch=3)
    prompts = [[6 + (i * 7 + j) % 58 for j in range(n)] for i, n in enumerate(lengths)]
    result = decoder.generate(prompts, new_tokens, Guidance(k, beta, temperature), seed=seed, trace=True)
    assert [row.index for row in result] == list(range(len(prompts)))
    for row in result:
        assert 0 < len(row.trace) <= new_tokens
        assert len(row.tokens) == len(row.logprobs) == len(row.rewards)
        assert len(row.tokens) + (row.finish_reason == "eos") == len(row.trace)
        assert all(token != 1 for token in row.tokens)
        for step in row.trace:
            assert len({c.token for c in step.candidates}) == k
            assert sum(c.probability for c in step.candidates) == pytest.approx(1, abs=1e-4)


def test_up_to_the_context_limit() -> None:
    decoder = make_decoder()
    row = decoder.generate([[5] * 100], 28, _never_eos(decoder))[0]
    assert len(row.tokens) == 28
    with pytest.raises(RGTGError, match="max_new_tokens <= 28"):
        decoder.generate([[5] * 100], 29, GREEDY)
    with pytest.raises(RGTGError, match=r"exceed its 128: shorten the prompt$"):
        decoder.generate([[5] * 128], 1, GREEDY)


def _never_eos(decoder: RewardGuidedDecoder) -> Guidance:
    decoder.lm.runner.model.generation_config.eos_token_id = None
    return GREEDY


def test_logits_of_minus_infinity_all_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder()
    logits = torch.full((2, 64), -torch.inf)
    logits[0, 13] = logits[1, 44] = 2.0
    monkeypatch.setattr(decoder.lm.runner, "logits", lambda hidden: logits[: len(hidden)])
    rows = decoder.generate([[5, 6], [7]], 2, Guidance(k=6), trace=True)
    assert [row.tokens for row in rows] == [[13, 13], [44, 44]]
    assert rows[0].trace[0].entropy == 0
    assert rows[0].logprobs == [0, 0]


def test_describe_is_plain_data(decoder: RewardGuidedDecoder) -> None:
    import json

    decoder.generate("w1", 2, GREEDY)
    described = json.loads(json.dumps(decoder.describe()))
    assert described["lm_engine"] in ("native", "transformers")
    assert described["instruction_set"] == instruction_set()
    assert described["cache_bytes"]["reward"] > 0
    assert json.loads(json.dumps(decoder.generate("w1", 2, GREEDY).stats.as_dict()))["tokens_per_second"] > 0


def test_phases_are_spans_of_the_profiler_on_demand() -> None:
    decoder = make_decoder()
    decoder.phase_timer = lambda: PhaseTimer(spans=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        phases = decoder.generate("w1 w2", 3, GREEDY).stats.phases
    names = {event.key for event in profile.key_averages()}
    assert {f"rgtg_fast::{phase}" for phase in phases} <= names
    assert set(phases) == {"prefill", "lm", "topk", "reward", "resample", "commit", "host"}


def test_a_cache_never_grows_to_the_product_of_two_calls() -> None:
    decoder = make_decoder()
    wide, long = [[5]] * 8, [[5] * 100]
    needs = {"wide": 8 * (1 + 4), "long": 100 + 4}
    for _ in range(2):
        decoder.generate(wide, 4, GREEDY)
        held = decoder.lm.runner.cache.keys.numel()
        decoder.generate(long, 4, GREEDY)
        assert decoder.lm.runner.cache.keys.numel() * needs["wide"] == held * needs["long"]
