"""Compiled blocks: the same rows, no new compilation for a longer cache, and what cannot be compiled."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from rgtg_fast import Guidance, MixtureReward, RewardGuidedDecoder, RGTGError, SequenceReward
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.test_ahead import recorded
from tests.models.adapters import MATRICES, write_adapter

GREEDY = Guidance(k=3, beta=1.0, temperature=0)
LAYERS = 3
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: torch.compile has nothing to compile with"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced as they would be compiled, and then run as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def make_base() -> Any:
    lm = make_lm(num_hidden_layers=LAYERS)
    lm.generation_config.eos_token_id = []
    return lm


def adapted(lm: Any, folders: list[Path], share: bool = True, compile: bool = False) -> RewardGuidedDecoder:
    guides = [SequenceReward(folder, share_trunk=share) for folder in folders]
    guide = guides[0] if len(guides) == 1 else MixtureReward(guides)
    return RewardGuidedDecoder.from_pretrained(
        (lm, make_tokenizer()), guide, max_batch=2, engine="transformers", compile=compile
    )


def make_decoder(compile: bool) -> RewardGuidedDecoder:
    tokenizer = make_tokenizer()
    lm = make_lm()
    lm.generation_config.eos_token_id = []
    guide = SequenceReward((make_rm(num_hidden_layers=1), tokenizer))
    return RewardGuidedDecoder.from_pretrained(
        (lm, tokenizer), guide, max_batch=2, engine="transformers", compile=compile
    )


@needs_compiler
def test_the_compilers_own_code_gives_the_same_row() -> None:
    """One small model as it is compiled for real; all else is traced as it would be compiled, or slow."""
    plain, compiled = (
        RewardGuidedDecoder.from_pretrained(
            (make_lm(num_hidden_layers=1), make_tokenizer()), engine="transformers", compile=compile
        )
        for compile in (False, True)
    )
    assert [d.describe()["compiled"] for d in (plain, compiled)] == [False, True]
    for decoder in (plain, compiled):
        decoder.lm.runner.model.generation_config.eos_token_id = []
    assert compiled.generate([[5, 6, 7]], 4)[0].tokens == plain.generate([[5, 6, 7]], 4)[0].tokens
    assert graphs() == 1


@pytest.fixture(params=["traced", pytest.param("compiled", marks=[pytest.mark.slow, needs_compiler])])
def traced_or_compiled(request: pytest.FixtureRequest) -> None:
    if request.param == "traced":
        request.getfixturevalue("traced")


@pytest.mark.usefixtures("traced_or_compiled")
def test_compiled_blocks_give_the_same_rows_and_serve_any_length() -> None:
    plain, compiled = make_decoder(compile=False), make_decoder(compile=True)
    assert compiled.describe()["compiled"]
    assert not plain.describe()["compiled"]
    prompts = [[5, 6, 7], [8, 9]]
    want = plain.generate(prompts, 6, GREEDY, trace=True)
    got = compiled.generate(prompts, 6, GREEDY, trace=True)
    assert graphs() == 2, "one for the base model's token, one for the candidates"
    assert [row.tokens for row in got] == [row.tokens for row in want]
    for a, b in zip(got, want, strict=True):
        assert a.rewards == pytest.approx(b.rewards, abs=1e-4)
    longer = compiled.generate(prompts, 20, GREEDY)
    assert [row.tokens[:6] for row in longer] == [row.tokens for row in want]
    assert graphs() == 2, "a longer cache compiles nothing"


def test_more_sizes_than_the_compiler_expects_of_one_function(traced: None) -> None:
    compiled = make_decoder(compile=True)
    for k in range(2, 10):
        compiled.generate([[5, 6, 7]], 1, Guidance(k=k, temperature=0))
    assert graphs() == 9


# ---- adapters in the base model's forward ----------------------------------------------------------------------------


@pytest.mark.usefixtures("traced_or_compiled")
def test_a_compiled_shared_trunk_gives_the_rows_of_two_models(tmp_path: Path) -> None:
    lm = make_base()
    folders = [write_adapter(tmp_path / str(i), lm, fork=i, rank=2 + i, seed=i) for i in (1, 2)]
    two = adapted(lm, folders, share=False).generate(PROMPTS[:2], 6, GREEDY)
    eager = adapted(lm, folders).generate(PROMPTS[:2], 6, GREEDY)
    compiled = adapted(lm, folders, compile=True)
    assert compiled.describe()["compiled"]
    got = compiled.generate(PROMPTS[:2], 6, GREEDY)
    assert graphs() == 1, "one forward a token"
    for row, same, other in zip(got, eager, two, strict=True):
        assert row.tokens == same.tokens == other.tokens
        assert row.rewards == pytest.approx(other.rewards, abs=2e-4)
    longer = compiled.generate(PROMPTS[:2], 20, GREEDY)
    assert [row.tokens[:6] for row in longer] == [row.tokens for row in two]
    assert graphs() == 1, "a longer cache compiles nothing"


@pytest.mark.usefixtures("traced_or_compiled")
def test_a_compiled_shared_trunk_in_bfloat16_is_as_near_as_it_rounds(tmp_path: Path) -> None:
    rewards = []
    for dtype in (torch.float32, torch.bfloat16):
        lm = make_base().to(torch.bfloat16).to(dtype)
        guided = adapted(lm, [write_adapter(tmp_path, lm, 1)], compile=dtype == torch.bfloat16)
        rows = guided.generate(PROMPTS[:2], 1, Guidance(k=1, temperature=0))
        rewards.append(torch.tensor([row.rewards for row in rows]))
    exact, rounded = rewards
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    "fork", [1, *(pytest.param(fork, marks=pytest.mark.slow) for fork in (0, LAYERS - 1, LAYERS))]
)
def test_an_adapter_is_traced_wherever_it_begins(tmp_path: Path, traced: None, fork: int) -> None:
    lm = make_base()
    folder = write_adapter(tmp_path, lm, fork)
    two = adapted(lm, [folder], share=False).generate(PROMPTS, 6, GREEDY)
    compiled = adapted(lm, [folder], compile=True)
    assert [row.tokens for row in compiled.generate(PROMPTS, 6, GREEDY)] == [row.tokens for row in two]
    assert graphs() == 2, "one for two rows, one for the row that is left"


@pytest.mark.parametrize(
    "order", [(0, 2), *(pytest.param(order, marks=pytest.mark.slow) for order in ((0, 1, 2), (2, 1, 0)))]
)
def test_what_was_compiled_for_one_adapter_does_not_serve_another(
    tmp_path: Path, traced: None, order: tuple[int, ...]
) -> None:
    """Models of the same shapes share compiled code where they may: which layers are corrected is part of it."""
    decoders = []
    for i in order:
        lm = make_base()
        names = (MATRICES[:1], (MATRICES[0], MATRICES[6]), MATRICES)[i]
        folder = write_adapter(tmp_path / str(i), lm, 1, names=names, size=2.0)
        want = adapted(lm, [folder], share=False).generate(PROMPTS, 4, GREEDY)
        decoders.append(adapted(lm, [folder], compile=True))
        for row, other in zip(decoders[-1].generate(PROMPTS, 4, GREEDY), want, strict=True):
            assert row.tokens == other.tokens
            assert row.rewards == pytest.approx(other.rewards, abs=2e-4)


def test_an_adapter_may_be_attached_to_a_compiled_model(tmp_path: Path, traced: None) -> None:
    lm = make_base()
    folders = [write_adapter(tmp_path / str(i), lm, fork=1 + i, seed=i) for i in range(2)]
    alone = RewardGuidedDecoder.from_pretrained((lm, make_tokenizer()), engine="transformers", compile=True)
    alone.generate(PROMPTS[:2], 3)
    guide = MixtureReward([SequenceReward(folder) for folder in folders])
    guide.bind(alone.lm, dtype=None, engine="transformers", max_length=None)
    late = RewardGuidedDecoder(alone.lm, guide, 2)
    want = adapted(lm, folders, share=False).generate(PROMPTS[:2], 6, GREEDY)
    before = graphs()
    assert [row.tokens for row in late.generate(PROMPTS[:2], 6, GREEDY)] == [row.tokens for row in want]
    assert graphs() == before + 1


def test_the_model_works_as_before_beside_and_after_compiled_hooks(tmp_path: Path, traced: None) -> None:
    lm = make_base()
    ids = torch.tensor([PROMPTS[2]])
    before = lm(input_ids=ids).logits
    compiled = adapted(lm, [write_adapter(tmp_path, lm, 0)], compile=True)
    compiled.generate(PROMPTS[:2], 3, GREEDY)
    assert torch.equal(lm(input_ids=ids).logits, before)
    assert any(module._forward_hooks for module in lm.modules())
    del compiled
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())
    assert torch.equal(lm(input_ids=ids).logits, before)


def test_what_cannot_be_compiled_is_said() -> None:
    native = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()))
    if native.describe()["lm_engine"] != "native":
        pytest.skip("the C++ extension is missing: its refusal is NOT tested")
    with pytest.raises(RGTGError, match="use engine='transformers'"):
        native.compile()


def test_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: given.append(settings["options"]))
    options = {"coordinate_descent_tuning": True}
    for compile in (True, options, {}):
        RewardGuidedDecoder.from_pretrained(
            (make_lm(), make_tokenizer()), engine="transformers", compile=compile
        )
    assert given == [{}, options, {}]


def test_an_unknown_option_is_one_line() -> None:
    with pytest.raises(
        RGTGError, match=r"torch.compile refuses the options \{'speed': 11\}: .*speed"
    ) as error:
        RewardGuidedDecoder.from_pretrained(
            (make_lm(), make_tokenizer()), engine="transformers", compile={"speed": 11}
        )
    assert "\n" not in str(error.value)


def test_steps_recorded_before_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), engine="transformers")
    graphs = recorded(decoder)
    want = decoder.generate([[5, 6, 7]], 4, GREEDY)[0].tokens
    assert len(graphs) == 1
    ran = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *a: (ran.append(1), function(*a))[1])
    decoder.compile()
    assert len(graphs) == 0
    assert decoder.generate([[5, 6, 7]], 4, GREEDY)[0].tokens == want
    assert ran
