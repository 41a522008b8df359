"""commit against a loop over rows."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import RGTGError
from rgtg_fast.ops import _extension, commit, use_backend
from tests.ops.specs import SPECS

BACKENDS = ["reference"] if _extension.missing_reason() else ["reference", "cpp"]
SPEC = SPECS["commit"]
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


def naive(k_new, v_new, k_cache, v_cache, lengths, choice, slots):
    for b, chosen in enumerate(choice.tolist()):
        slot = b if slots is None else slots[b]
        if chosen >= 0:
            k_cache[:, slot, :, lengths[slot]] = k_new[:, b, :, chosen]
            v_cache[:, slot, :, lengths[slot]] = v_new[:, b, :, chosen]
            lengths[slot] += 1


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 4, 3, 5, 9, 7)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_equals_a_loop(backend, sizes, dtype, data):
    slots = data.draw(st.sampled_from([None, sizes[1], sizes[1] + 3]))
    arguments = SPEC.make_inputs({**dict(zip("LBGSTD", sizes, strict=True)), "slots": slots}, dtype)
    B, S = sizes[1], sizes[3]
    arguments["choice"] = torch.tensor(data.draw(st.lists(st.integers(-1, S - 1), min_size=B, max_size=B)))
    want = copy.deepcopy(arguments)
    naive(**want)
    with use_backend(backend):
        assert commit(**arguments) is None
    for name in want:
        torch.testing.assert_close(arguments[name], want[name], **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finished_rows_stand_still_even_when_their_cache_is_full(backend):
    arguments = SPEC.make_inputs({"L": 2, "B": 2, "G": 1, "S": 3, "T": 4, "D": 2}, torch.float32)
    arguments["lengths"], arguments["choice"] = torch.tensor([4, 3]), torch.tensor([-1, 2])
    before = copy.deepcopy(arguments)
    with use_backend(backend):
        commit(**arguments)
    assert arguments["lengths"].tolist() == [4, 4]
    torch.testing.assert_close(arguments["k_cache"][:, 0], before["k_cache"][:, 0], **EXACT)
    assert torch.equal(arguments["k_cache"][:, 1, :, 3], before["k_new"][:, 1, :, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_may_be_views_of_one_buffer(backend):
    L, B, G, S, T, D = 3, 2, 2, 4, 6, 5
    buffer = torch.full((2, B, L, T, G, D), -1.0)
    k_cache, v_cache = (buffer[i].permute(1, 0, 3, 2, 4) for i in (0, 1))
    new = torch.randn(2, L, B, S, G, D)
    k_new, v_new = (new[i].transpose(2, 3) for i in (0, 1))
    lengths = torch.tensor([9, 2, 9, 5])[1::2]
    with use_backend(backend):
        commit(k_new, v_new, k_cache, v_cache, lengths, torch.tensor([3, 0]))
    assert lengths.tolist() == [3, 6]
    assert torch.equal(buffer[0, 0, :, 2], new[0, :, 0, 3])
    assert torch.equal(buffer[1, 1, :, 5], new[1, :, 1, 0])
    assert (buffer == -1).sum() == buffer.numel() - 4 * L * G * D


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": torch.tensor([0, 3])}, r"choice\[1\]=3 is not a new token \(S=3\): use -1 to 2"),
        ({"choice": torch.tensor([-2, 0])}, r"choice\[0\]=-2 is not a new token"),
        ({"lengths": torch.tensor([0, 4])}, r"lengths\[1\]=4 leaves no free position in the cache \(T=4\)"),
        ({"k_new": torch.zeros(1, 2, 3, 2)}, r"k_new has shape \[1, 2, 3, 2\]"),
        (
            {"v_cache": torch.zeros(1, 2, 1, 4, 3)},
            r"v_cache has shape \[1, 2, 1, 4, 3\]: use \[L, B, G, T, D\]",
        ),
        ({"v_new": torch.zeros(1, 2, 1, 3, 2).double()}, "v_new has dtype torch.float64: use torch.float32"),
        ({"k_cache": torch.zeros(1, 2, 1, 2, 4).mT}, "their last dimension must be contiguous"),
        (
            {"slots": torch.tensor([1, 1])},
            r"slots\[0\] and slots\[1\] are both 1: give every row a slot of its own",
        ),
        ({"slots": torch.tensor([0, 2])}, r"slots\[1\]=2 is outside the cache \(N=2\): use 0 to 1"),
        ({"slots": torch.tensor([0, -1])}, r"slots\[1\]=-1 is outside the cache"),
        ({"slots": torch.tensor([0])}, r"slots has shape \[1\]: use \[B\] = \[2\]"),
        (
            {"slots": torch.tensor([1, 0]), "lengths": torch.tensor([4, 0])},
            r"lengths\[0\]=4 leaves no free position",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(backend, change, message):
    arguments = SPEC.make_inputs({"L": 1, "B": 2, "G": 1, "S": 3, "T": 4, "D": 2}, torch.float32)
    arguments["choice"] = torch.tensor([0, 0])
    arguments.update(change)
    before = copy.deepcopy(arguments)
    with use_backend(backend), pytest.raises(RGTGError, match=message) as error:
        commit(**arguments)
    assert "\n" not in str(error.value)
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, **EXACT)
