"""bf16 products on AMX tiles against the instruction's order of additions, and that order itself."""

from __future__ import annotations

import pytest
import torch

from rgtg_fast.models.cpp_layers import linear
from rgtg_fast.ops import _extension
from tests.models.tiles import COLUMNS, fused_multiply_add, product_of_tiles

extension = _extension.load(warn=False)
needs_tiles = pytest.mark.skipif(
    extension is None or extension.isa() != "amx", reason="the kernels in use here have no AMX tiles"
)

# Rows, columns of y, columns of x: one and several tiles of each, whole and not; more rows than pass a panel at once.
SIZES = [
    (1, 16, 32),
    (3, 20, 33),
    (16, 5, 64),
    (17, 50, 96),
    (31, 33, 1536),
    (33, 100, 700),
    (80, 64, 576),
    (300, 37, 70),
]


def numbers(kind: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, columns] bfloat16."""
    if kind == "bits":
        return torch.randint(-(2**15), 2**15, (rows, columns), generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )
    low, high = {"near": (0, 1), "far": (-60, 60), "tiny": (-72, -58)}[kind]
    exponents = torch.randint(low, high, (rows, columns), generator=generator)
    return (torch.randn(rows, columns, generator=generator) * torch.exp2(exponents.float())).bfloat16()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN equals NaN of any payload."""
    both = actual.isnan() & expected.isnan()
    assert bool((both | (actual.view(torch.int32) == expected.view(torch.int32))).all())


@needs_tiles
@pytest.mark.parametrize("kind", ["near", "far", "tiny", "bits"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_the_kernel_adds_in_the_order_of_the_instruction(size: tuple[int, int, int], kind: str) -> None:
    """`tiny` has subnormal products and sums, `bits` also infinities, NaN and negative zeros."""
    rows, outer, inner = size
    generator = torch.Generator().manual_seed(0)
    x, w = numbers(kind, rows, inner, generator), numbers(kind, outer, inner, generator)
    assert_same_bits(linear(x.float(), w), product_of_tiles(x, w))


@needs_tiles
def test_neighbours_of_a_tile_are_not_read() -> None:
    """The rows behind the last columns, and what stands behind the matrix, are NaN."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((24, 45), torch.nan, dtype=torch.bfloat16).flatten()
    x, w = numbers("near", 5, 45, generator), numbers("near", 21, 45, generator)
    memory[: 21 * 45] = w.flatten()
    memory[:45] = torch.nan
    y = linear(x.float(), memory[: 21 * 45].view(21, 45))
    assert bool(y[:, 0].isnan().all())
    assert_same_bits(y[:, 1:].contiguous(), product_of_tiles(x, w[1:]))


@needs_tiles
def test_bits_do_not_depend_on_rows_or_on_where_columns_are_cut() -> None:
    """Also with a bias: rows alone, in groups of any size, on one to four threads, columns alone."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(70, 1400, generator=generator), numbers("near", 77, 1400, generator)
    bias = torch.randn(77, generator=generator)
    threads = torch.get_num_threads()
    whole = linear(x, w, bias)
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for rows in (1, 2, 15, 16, 17, 32, 33, 64, 70):
                assert torch.equal(linear(x[-rows:], w, bias), whole[-rows:])
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (3, 60), (16, 48), (40, 77)):
        assert torch.equal(linear(x, w[begin:end], bias[begin:end]), whole[:, begin:end])


@pytest.mark.parametrize("inner", [1, 31, 32, 100])
def test_the_order_is_that_of_a_product(inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = numbers("near", 4, inner, generator), numbers("near", 6, inner, generator)
    y = product_of_tiles(x, w)
    assert (y - x.double() @ w.double().T).abs().max() <= 1e-5 * inner**0.5
    assert_same_bits(product_of_tiles(x[2:3], w[:5]), y[2:3, :5].contiguous())


def test_the_order_tells_even_columns_from_odd_ones() -> None:
    """2^24 takes up a 1 of its own parity and not one of the other; later blocks are added as a whole."""
    w = torch.ones(1, 2 * COLUMNS, dtype=torch.bfloat16)
    for ones, expected in (((2, 4), 0), ((1, 3), 2), ((COLUMNS, COLUMNS + 1), 2), ((COLUMNS,), 0)):
        x = torch.zeros(1, 2 * COLUMNS, dtype=torch.bfloat16)
        x[0, 0] = 2.0**24
        x[0, list(ones)] = 1
        assert product_of_tiles(x, w).item() - 2.0**24 == expected


def test_the_order_flushes_subnormal_numbers() -> None:
    def product(a: float, b: float) -> float:
        return product_of_tiles(torch.tensor([[a]]).bfloat16(), torch.tensor([[b]]).bfloat16()).item()

    assert product(2.0**-70, 2.0**-56) == 2.0**-126
    assert product(2.0**-70, 2.0**-57) == 0
    assert product(2.0**-127, 2.0**100) == 0


def test_a_multiply_add_rounds_once() -> None:
    a, c = torch.tensor(1 + 2.0**-7), torch.tensor(2.0**-23)
    # 2^-23 is half of the last place of the sum.
    assert fused_multiply_add(a, a, 1 + c).item() == (1 + 2.0**-7) ** 2 + 1
    assert fused_multiply_add(a, a, -a * a + c).item() == 2.0**-23
