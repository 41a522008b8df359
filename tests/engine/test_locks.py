"""What two users of one decoder, model or guide see of each other: right answers or an error."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rgtg_fast import (
    BestOfN,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    MixtureReward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from tests.conftest import make_lm, make_rm, make_tokenizer

GREEDY = Guidance(k=8, beta=3.0, temperature=0)
PROMPTS = ("w1 w2", "w2 w3 w4 w5")


def make_decoder(reward: Any = None, seed: int = 0, **settings: Any) -> RewardGuidedDecoder:
    tokenizer = make_tokenizer()
    reward = SequenceReward((make_rm(), tokenizer)) if reward is None else reward
    return RewardGuidedDecoder.from_pretrained((make_lm(seed), tokenizer), reward=reward, **settings)


def tokens(decoder: RewardGuidedDecoder, prompt: str = PROMPTS[0], new: int = 6) -> list[int]:
    return decoder.generate(prompt, new, GREEDY)[0].tokens


def by_prefix(prefix_ids: list[torch.Tensor], candidate_ids: torch.Tensor) -> torch.Tensor:
    rows = zip(prefix_ids, candidate_ids, strict=True)
    return torch.stack([(ids * int(prefix.sum())) % 11 for prefix, ids in rows]).float()


# ---- one decoder ----------------------------------------------------------------------------------------------------


def test_the_older_of_two_streams_ends_before_it_touches_the_newer_ones_cache() -> None:
    decoder = make_decoder()
    right = tokens(decoder, PROMPTS[1])
    older, newer = decoder.stream(PROMPTS[0], 6, GREEDY), decoder.stream(PROMPTS[1], 6, GREEDY)
    found = [next(newer).token]
    with pytest.raises(RGTGError, match="called again before the run had finished"):
        next(older)
    found += [piece.token for piece in newer]
    assert found[: len(right)] == right


def test_a_dropped_or_broken_run_leaves_nothing_behind() -> None:
    calls = iter(range(99))

    def interrupted(prefix_ids: list[torch.Tensor], candidate_ids: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return by_prefix(prefix_ids, candidate_ids)

    decoder = make_decoder(interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens(decoder)
    right = tokens(make_decoder(by_prefix))
    assert tokens(decoder) == right
    dropped = decoder.iterate(list(PROMPTS), 6, GREEDY)
    next(dropped)
    running = decoder.stream(PROMPTS[0], 6, GREEDY)
    found = [next(running).token]
    del dropped
    found += [piece.token for piece in running]
    assert found[: len(right)] == right


def test_threads_wait_for_each_other() -> None:
    """A thread that comes in the middle of a step, held there, decodes after it; both answers are right."""
    inside, come = threading.Event(), threading.Event()

    def held(prefix_ids: list[torch.Tensor], candidate_ids: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is first and not inside.is_set():
            inside.set()
            assert come.wait(60)
        return by_prefix(prefix_ids, candidate_ids)

    first = threading.Thread()
    decoder = make_decoder(held)
    right = [tokens(decoder, prompt) for prompt in PROMPTS]
    found: dict[int, list[int]] = {}

    def decode(which: int) -> None:
        if which:
            come.set()
        found[which] = tokens(decoder, PROMPTS[which])

    first = threading.Thread(target=decode, args=(0,))
    second = threading.Thread(target=decode, args=(1,))
    first.start()
    assert inside.wait(60)
    second.start()
    for thread in (first, second):
        thread.join()
    assert [found[0], found[1]] == right


def test_many_short_calls_of_two_threads_are_right() -> None:
    decoder = make_decoder(max_batch=2)
    right = [tokens(decoder, prompt, 3) for prompt in PROMPTS]
    wrong: list[object] = []

    def work(which: int) -> None:
        for _ in range(10):
            try:
                found = tokens(decoder, PROMPTS[which], 3)
            except Exception as error:  # noqa: BLE001 - the test names it
                wrong.append(error)
                return
            if found != right[which]:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_rewards_own_code_may_call_another_decoder_but_not_its_own() -> None:
    inner: list[RewardGuidedDecoder] = []

    def calling(prefix_ids: list[torch.Tensor], candidate_ids: torch.Tensor) -> torch.Tensor:
        for decoder in inner:
            decoder.generate("w5", 1, GREEDY)
        return by_prefix(prefix_ids, candidate_ids)

    decoder = make_decoder(calling)
    right = tokens(decoder)
    inner.append(decoder)
    with pytest.raises(RGTGError, match="from within its own step"):
        tokens(decoder)
    other = RewardGuidedDecoder.from_pretrained((decoder.lm.runner.model, decoder.tokenizer))  # pyright: ignore[reportArgumentType]
    inner[:] = [other]
    assert tokens(decoder) == right


def test_a_forked_process_decodes_though_another_thread_held_the_decoder() -> None:
    decoder = make_decoder(by_prefix)
    right = tokens(decoder)
    with decoder._turns.taken(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks beside threads
        child = os.fork()
        if not child:
            os._exit(0 if tokens(decoder) == right else 3)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_decoder_is_not_copied(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(RGTGError, match="cannot be copied"):
        copied(make_decoder(by_prefix))


def test_two_decoders_over_one_cache_end_each_others_streams() -> None:
    decoder = make_decoder()
    right = tokens(decoder)
    other = RewardGuidedDecoder(decoder.lm, decoder.reward, 2)
    stream = decoder.stream(PROMPTS[0], 6, GREEDY)
    next(stream)
    assert tokens(other) == right
    with pytest.raises(RGTGError, match="another decoder with the same"):
        next(stream)
    assert tokens(decoder) == right


def test_best_of_n_goes_on_after_its_own_samples() -> None:
    decoder = make_decoder(by_prefix, max_batch=2)
    strategy = BestOfN(n=2, top_k=8)
    together = decoder.generate(list(PROMPTS) * 5, 4, strategy=strategy)
    assert [row.tokens for _, row in decoder.iterate(list(PROMPTS) * 5, 4, strategy=strategy)] == [
        row.tokens for row in together
    ]


# ---- one guide in two decoders --------------------------------------------------------------------------------------


def side_by_side(reward: Any) -> None:
    """Streams of two decoders with one reward object, a token each in turn."""
    decoders = [make_decoder(reward, seed) for seed in (0, 5)]
    right = [tokens(decoder, prompt) for decoder, prompt in zip(decoders, PROMPTS, strict=True)]
    assert right[0] == tokens(decoders[0], PROMPTS[0])
    streams = [decoder.stream(prompt, 6, GREEDY) for decoder, prompt in zip(decoders, PROMPTS, strict=True)]
    found: list[list[int]] = [[], []]
    for _ in range(3):
        for which, stream in enumerate(streams):
            found[which].append(next(stream).token)
    assert found[0] == right[0][:3]
    assert found[1] == right[1][:3]


@pytest.mark.parametrize("kind", ["function", "text", "sequence", "vocabulary", "contrastive", "mixture"])
def test_one_guide_serves_two_decoders_side_by_side(kind: str) -> None:
    tokenizer = make_tokenizer()
    make: dict[str, Callable[[], Any]] = {
        "function": lambda: FunctionReward(by_prefix),
        "text": lambda: TextReward(lambda prompts, answers: [float(len(answer) % 7) for answer in answers]),
        "sequence": lambda: SequenceReward((make_rm(), tokenizer)),
        "vocabulary": lambda: VocabularyReward((make_lm(3), tokenizer)),
        "contrastive": lambda: ContrastiveReward("w9", "w8"),
        "mixture": lambda: MixtureReward([SequenceReward((make_rm(), tokenizer)), FunctionReward(by_prefix)]),
    }
    alone = [
        tokens(make_decoder(make[kind](), seed), prompt) for seed, prompt in zip((0, 5), PROMPTS, strict=True)
    ]
    reward = make[kind]()
    one, two = (make_decoder(reward, seed) for seed in (0, 5))
    assert [tokens(one, PROMPTS[0]), tokens(two, PROMPTS[1])] == alone
    side_by_side(reward)


def test_weights_of_a_mixture_are_those_of_all_its_decoders() -> None:
    mixture = MixtureReward([FunctionReward(by_prefix), ContrastiveReward()], [1.0, 0.0])
    one, two = make_decoder(mixture), make_decoder(mixture)
    mixture.weights = (0.0, 1.0)
    right = tokens(make_decoder(ContrastiveReward()))
    assert tokens(one) == tokens(two) == right


def test_a_part_of_a_mixture_may_guide_alone_too() -> None:
    part = SequenceReward((make_rm(), make_tokenizer()))
    alone = make_decoder(part)
    right = tokens(alone)
    assert tokens(make_decoder(MixtureReward([part], [1.0]))) == right
    assert tokens(alone) == right


def test_decoders_take_turns_with_somebodys_own_kind_of_guide() -> None:
    """Its state is not known, so it is not copied: one run at a time, bound to whose run it is."""

    class Own(FunctionReward):
        pass

    own = Own(by_prefix)
    decoders = [make_decoder(own, seed) for seed in (0, 5)]
    right = [
        tokens(make_decoder(by_prefix, seed), prompt) for seed, prompt in zip((0, 5), PROMPTS, strict=True)
    ]
    assert [tokens(decoder, prompt) for decoder, prompt in zip(decoders, PROMPTS, strict=True)] == right
    older = decoders[0].stream(PROMPTS[0], 6, GREEDY)
    assert next(older).token == right[0][0]
    assert tokens(decoders[1], PROMPTS[1]) == right[1]
    with pytest.raises(RGTGError, match="another decoder with the same reward"):
        next(older)


def test_a_guide_that_was_bound_elsewhere_by_hand_is_refused() -> None:
    guide = SequenceReward((make_rm(), make_tokenizer()))
    decoder, other = make_decoder(guide), make_decoder(by_prefix, 5)
    guide.bind(other.lm, dtype=None, engine="auto", max_length=None)
    with pytest.raises(RGTGError, match="bound to another decoder's base model"):
        tokens(decoder)


def test_a_guide_whose_decoder_is_gone_is_used_again() -> None:
    guide = FunctionReward(by_prefix)
    decoder = make_decoder(guide)
    assert decoder.reward is guide
    del decoder
    assert make_decoder(guide).reward is guide


# ---- a model that changes -------------------------------------------------------------------------------------------


@pytest.fixture(params=["native", "transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def fresh(decoder: RewardGuidedDecoder, engine: str) -> list[int]:
    """What a decoder that is made now, on copies, says."""
    model = copy.deepcopy(decoder.lm.runner.model)
    return tokens(
        RewardGuidedDecoder.from_pretrained(
            (model, decoder.tokenizer), reward=SequenceReward((make_rm(), decoder.tokenizer)), engine=engine
        )
    )


@torch.no_grad()
def test_weights_that_are_written_in_place_are_the_ones_that_count(engine: str) -> None:
    decoder = make_decoder(engine=engine)
    model = decoder.lm.runner.model
    before = tokens(decoder)
    for parameter in model.parameters():
        # Norm weights above all: the native engine copies them.
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert tokens(decoder) == fresh(decoder, engine) != before
    for parameter in model.parameters():
        parameter.data.mul_(0.7)
    assert tokens(decoder) == fresh(decoder, engine)
    model.load_state_dict(make_lm(7).state_dict())
    assert tokens(decoder) == tokens(make_decoder(seed=7, engine=engine))


def test_modes_of_the_owner_are_put_aside_and_put_back(engine: str) -> None:
    decoder = make_decoder(engine=engine)
    model = decoder.lm.runner.model
    right = tokens(decoder)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokens(decoder) == right
    assert [module.training for module in model.modules()] == modes
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        assert tokens(decoder) == right
        assert model.config._attn_implementation == kind
    torch.set_default_dtype(torch.float64)
    try:
        assert tokens(decoder) == right
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: model.half(), "float32 on cpu became torch.float16"),
        (lambda model: setattr(model, "lm_head", torch.nn.Linear(32, 64, bias=False)), "another head"),
        (lambda model: model.load_state_dict(make_lm(8).state_dict(), assign=True), "moved or replaced"),
        (lambda model: model.model.layers[0].register_forward_hook(lambda *_: None), "hooks"),
        (
            lambda model: setattr(model.model.layers[1].mlp, "up_proj", torch.nn.Linear(32, 48, bias=False)),
            "modules were replaced",
        ),
    ],
)
def test_other_changes_are_refused_by_the_native_engine(change: Callable[[Any], Any], what: str) -> None:
    decoder = make_decoder(by_prefix, engine="native")
    change(decoder.lm.runner.model)
    with pytest.raises(RGTGError, match=f"changed after it was loaded.*{what}"):
        tokens(decoder)


@torch.no_grad()
def test_weights_do_not_change_in_the_middle_of_a_run(engine: str) -> None:
    decoder = make_decoder(engine=engine)
    stream = decoder.stream(PROMPTS[0], 6, GREEDY)
    next(stream)
    next(decoder.reward.models()[0].model.parameters()).mul_(1.1)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(RGTGError, match="in the middle of a run"):
        next(stream)


def test_joined_products_take_biases_over() -> None:
    tokenizer = make_tokenizer()
    model: Any = make_lm(attention_bias=True)
    decoder = RewardGuidedDecoder.from_pretrained(
        (model, tokenizer), engine="transformers", fuse_projections=True
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.fill_(0.5)
            layer.self_attn.v_proj.bias.fill_(0.7)
    found = decoder.generate("w1 w2", 6, GREEDY)[0].tokens
    plain = RewardGuidedDecoder.from_pretrained((copy.deepcopy(model), tokenizer), engine="transformers")
    assert found == plain.generate("w1 w2", 6, GREEDY)[0].tokens
