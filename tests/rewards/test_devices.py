"""A base model and its reward's model on two devices.

The second device is a pretended one: its tensors are held by the CPU and marked, and an operation that reads tensors of
both devices fails, as it does on a GPU. It shows where the decoder copies and where it must; not streams, nor speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RADReward,
    Reward,
    RewardGuidedDecoder,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.errors import RGTGError
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter

OTHER = torch.device("privateuseone", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}


_setup_privateuseone_for_python_backend()


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `held` has its values."""

    held: torch.Tensor

    def tolist(self) -> Any:
        return self.held.tolist()

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        # What is made in inference mode cannot be a view of what was made outside of it.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=OTHER,
            )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, [])


def run(func: Any, args: Any, kwargs: dict[str, Any], crossed: list[str]) -> Any:
    """An operation on either device; copies from one to the other are noted."""
    flat: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, flat.append, (args, kwargs))
    there = [isinstance(each, Elsewhere) for each in flat]
    target = kwargs.get("device")
    if func in COPIES:
        to = there[0] if target is None else torch.device(target).type == OTHER.type
        if func is aten.copy_.default:
            crosses = there[0] != there[1]
        else:
            crosses = to != there[0]
        if crosses:
            crossed.append(f"{tuple(flat[-1].shape)} to {'the reward' if to else 'the base model'}")
    else:
        to = any(there) if target is None else torch.device(target).type == OTHER.type
        mixed = [tuple(t.shape) for t, other in zip(flat, there, strict=True) if not other and t.dim()]
        assert not (any(there) and mixed), f"{func} reads tensors of both devices: {mixed}"
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if to else target}
    held, held_kwargs = tree_map_only(Elsewhere, lambda each: each.held, (args, kwargs))
    out = func(*held, **held_kwargs)
    if not to:
        return out
    wrapped = tree_map(lambda each: Elsewhere(each) if isinstance(each, torch.Tensor) else each, out)
    if func is aten._local_scalar_dense.default:
        return out
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if any(there) else wrapped


class TwoDevices(TorchDispatchMode):
    """Makes tensors on the pretended device, and notes what crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return run(func, args, kwargs or {}, self.crossed)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoDevices]:
    monkeypatch.setattr("rgtg_fast.models.device.DEVICE_TYPES", ("cpu", "cuda", OTHER.type))
    tensor = torch.tensor

    def made(data: Any, device: Any = None, **settings: Any) -> torch.Tensor:
        there = device is not None and torch.device(device).type == OTHER.type
        return Elsewhere(tensor(data, **settings)) if there else tensor(data, device=device, **settings)

    # torch.tensor takes no notice of modes.
    monkeypatch.setattr(torch, "tensor", made)
    with TwoDevices() as mode:
        yield mode


TOKENIZER = make_tokenizer()
PROMPTS = ["w1 w2", "w3", "w5 w6 w7"]
MAKERS: dict[str, Callable[[], Reward]] = {
    "sequence": lambda: SequenceReward((make_rm(), TOKENIZER)),
    # Of a seed whose rewards are 0, 1 or far from 0, where rounding would be a large part of them.
    "rad": lambda: RADReward((make_rm(seed=5), TOKENIZER)),
    "farma": lambda: VocabularyReward((make_lm(seed=3), TOKENIZER)),
    "genarm": lambda: AutoregressiveReward((make_lm(seed=3), TOKENIZER)),
    "eft": lambda: LogRatioReward((make_lm(seed=3), TOKENIZER), (make_lm(seed=4), TOKENIZER)),
    "text": lambda: TextReward((make_rm(), TOKENIZER)),
    "mixture": lambda: MixtureReward(
        [SequenceReward((make_rm(), TOKENIZER)), ContrastiveReward("w8", "w9")], [0.7, 0.3]
    ),
}


def decoder_with(reward: Reward, device: torch.device | None) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained(
        (make_lm(), TOKENIZER), reward, engine="transformers", reward_device=device, max_batch=2
    )


def outputs(decoder: RewardGuidedDecoder, support: str = "lm") -> tuple[list[list[int]], list[float]]:
    """Tokens, and rewards of these and of given answers."""
    guidance = Guidance(k=4, beta=2.0, support=support)
    rows = decoder.generate(PROMPTS, 5, guidance, seed=[1, 2, 3])
    given = [reward for rewards in decoder.score(PROMPTS, [[5, 6], [7], [8, 9, 10]]) for reward in rewards]
    return [row.tokens for row in rows], [*(row.reward or 0 for row in rows), *given]


def assert_equal(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """The tokens are equal, the rewards up to the rounding of the devices' own products."""
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_a_reward_on_another_device_gives_the_same(name: str, request: pytest.FixtureRequest) -> None:
    expected = outputs(decoder_with(MAKERS[name](), None))
    request.getfixturevalue("two_devices")
    decoder = decoder_with(MAKERS[name](), OTHER)
    models = [each for each in decoder.reward.loaded() if isinstance(each, torch.nn.Module)]  # pyright: ignore[reportOptionalMemberAccess]
    assert models
    assert all(isinstance(weight, Elsewhere) for model in models for weight in model.parameters())
    assert_equal(outputs(decoder), expected)


@pytest.mark.slow
def test_the_whole_vocabulary_comes_from_another_device(request: pytest.FixtureRequest) -> None:
    expected = {kind: outputs(decoder_with(MAKERS["farma"](), None), kind) for kind in ("all", "combined")}
    request.getfixturevalue("two_devices")
    decoder = decoder_with(MAKERS["farma"](), OTHER)
    for kind, before in expected.items():
        assert_equal(outputs(decoder, kind), before)


def test_candidates_and_choices_cross_once_a_step(request: pytest.FixtureRequest) -> None:
    (row,) = decoder_with(MAKERS["sequence"](), None).generate("w1 w2", 3, Guidance(k=4), seed=1)
    expected = row.tokens, row.reward
    two_devices = request.getfixturevalue("two_devices")
    decoder = decoder_with(MAKERS["sequence"](), OTHER)
    two_devices.crossed.clear()
    (row,) = decoder.generate("w1 w2", 3, Guidance(k=4), seed=1)
    assert_equal((row.tokens, row.reward), expected)
    step = ["(1, 4) to the reward", "(1, 4) to the base model", "(1,) to the reward"]
    assert two_devices.crossed == ["(1, 2) to the reward", *step * 3]


@pytest.mark.slow
def test_steps_on_two_devices_are_not_ahead_of_the_host(two_devices: TwoDevices) -> None:
    decoder = decoder_with(MAKERS["sequence"](), OTHER)
    assert decoder.describe()["graphs"] is False
    decoder.max_in_flight = 1
    assert outputs(decoder)
    with pytest.raises(RGTGError, match="graphs=True"):
        RewardGuidedDecoder.from_pretrained(
            (make_lm(), TOKENIZER), (make_rm(), TOKENIZER), reward_device=OTHER, graphs=True
        )


@pytest.mark.parametrize(
    "reward",
    [None, ContrastiveReward("w8", "w9"), lambda prefix, ids: ids],
    ids=["none", "contrastive", "function"],
)
def test_a_reward_without_a_model_has_no_device(reward: object) -> None:
    with pytest.raises(RGTGError, match=r"reward_device='cpu' and .* no model of its own"):
        RewardGuidedDecoder.from_pretrained((make_lm(), TOKENIZER), reward, reward_device="cpu")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_an_adapter_that_shares_the_forward_is_refused(tmp_path: Path, two_devices: TwoDevices) -> None:
    lm = make_lm()
    folder = str(write_adapter(tmp_path, lm))
    with pytest.raises(
        RGTGError, match=r"share_trunk=True runs .* on cpu and reward_device is privateuseone:0"
    ):
        RewardGuidedDecoder.from_pretrained(
            (lm, TOKENIZER), SequenceReward(folder, share_trunk=True), reward_device=OTHER
        )
    decoder = RewardGuidedDecoder.from_pretrained((lm, TOKENIZER), folder, reward_device=OTHER)
    assert "reward_device='privateuseone:0'" in str(decoder.describe()["reward_trunk"])


def test_reward_device_of_the_base_model_changes_nothing() -> None:
    reward = MAKERS["sequence"]()
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), TOKENIZER), reward, reward_device="cpu")
    assert decoder.lm.other_device is None
    with pytest.raises(RGTGError, match="device='toaster'"):
        RewardGuidedDecoder.from_pretrained((make_lm(), TOKENIZER), reward, reward_device="toaster")
