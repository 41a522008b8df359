"""Every Triton kernel compiled for GPUs that are not here: tensor cores, shared memory, spills, their page."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.ops import instructions, kernel_table
from rgtg_fast.ops.partial_bt_loss import MODES, WEIGHTS
from rgtg_fast.ops.topk_logprobs import MAX_K, MAX_V, largest_k, triton_limit
from tests.covering import daily
from tests.ops.specs import SPECS

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "Triton is not installed: the Triton kernels are NOT compiled (pip install triton)",
        allow_module_level=True,
    )

# The tensor cores' instructions that came with an architecture.
OWN = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
KERNELS = sorted((Path(__file__).parents[2] / "rgtg_fast" / "ops").glob("*/kernel.py"))
pytestmark = pytest.mark.triton


tree_attention, topk_logprobs = SPECS["tree_attention"].kernel, SPECS["topk_logprobs"].kernel
SIGNATURES = [(*entry, arch) for arch in kernel_table.SHARED_LIMIT for entry in kernel_table.signatures(arch)]


def shows(op: str, kernel: str, signature: Mapping[str, str], arch: int = 90) -> set[object]:
    """What one compilation shows: every value of every argument of the kernel, on the one architecture of the default
    run."""
    return {(op, kernel, *item) for item in signature.items()} if arch == 90 else set()


def name_of(value: object) -> str:
    return kernel_table.label(value).replace(" ", "-") if isinstance(value, Mapping) else str(value)


@pytest.mark.parametrize(
    ("op", "kernel", "signature", "arch"),
    daily(SIGNATURES, shows),
    ids=name_of,
)
def test_a_signature_compiles_without_spills_and_for_tensor_cores(op, kernel, signature, arch):
    row = kernel_table.compile_one(op, kernel, signature, arch)
    assert 0 < row.registers <= 255
    assert row.shared <= kernel_table.SHARED_LIMIT[arch]
    if not kernel_table.may_spill(row):
        # 8 bytes: the assembler parks one register to reach the next step of occupancy.
        assert row.stack <= 8
    if kernel == "tree_attention_kernel":
        assert row.tensor_cores
        # Keys and values are on their way, 16 bytes at a time, while others are computed with.
        assert row.asynchronous or int(signature["num_stages"]) == 1
        # The generation's own instructions where there are rows enough for them.
        if int(signature["BLOCK_M"]) >= 64 and arch in OWN:
            assert OWN[arch] in row.tensor_cores


def test_attention_is_compiled_for_every_dtype_and_for_many_rows():
    attention = [signature for _, kernel, signature, _ in SIGNATURES if kernel == "tree_attention_kernel"]
    assert {kernel_table.label(signature).split()[0] for signature in attention} == {"bf16", "fp16", "fp32"}
    assert any(int(signature["BLOCK_M"]) >= 64 for signature in attention)


@pytest.mark.parametrize("leaves", [1, 0])
def test_two_programs_of_attention_share_a_multiprocessor(leaves):
    """On sm_90, for 10 candidates of a head of 128: one's loads and scores go on while the other waits."""
    # Of a multiprocessor (CUDA C++ programming guide, compute capability 9.0).
    registers, shared = 65536, 228 * 1024
    settings = tree_attention.configuration(128, 40, tree_attention.ALONE, torch.bfloat16) | {
        "LEAVES": leaves
    }
    want = {name: str(value) for name, value in settings.items()}
    signature = next(s for _, _, s, arch in SIGNATURES if arch == 90 and want.items() <= s.items())
    row = kernel_table.compile_one("tree_attention", "tree_attention_kernel", signature, 90)
    threads = 32 * int(signature["num_warps"])
    # Registers are given to warps by eights a thread; every program takes 1 KiB more of shared memory.
    assert 2 * threads * -(-row.registers // 8) * 8 <= registers
    assert 2 * (row.shared + 1024) <= shared


def test_a_leaf_never_has_partial_sums_that_outweigh_the_prefix():
    """Bytes of a leaf's sums (float32) stay below those of its keys and values (2 bytes each) for up to 128 rows."""
    for block_m in (16, 32, 64, 128):
        least = tree_attention.least_leaf(block_m)
        for length in (1, 500, 513, 1024, 1025, 2048, 4096, 10**6):
            leaf = tree_attention.leaf_of(length, least)
            assert 64 <= least <= leaf <= tree_attention.LEAF
            assert block_m * 4 <= leaf * 2 * 2 / 2
            assert -(-length // leaf) <= max(tree_attention.MAX_PARTS, -(-length // tree_attention.LEAF))
    assert [tree_attention.leaf_of(n, 64) for n in (1, 512, 513, 1024, 1025)] == [64, 64, 128, 128, 256]


@pytest.mark.parametrize(
    ("B", "T", "split"),
    [
        (1, 512, (0, 4)),
        (1, 576, (0, 5)),
        (1, 4096, (0, 16)),
        (8, 512, (0, 4)),
        (8, 4096, (2048, 2)),
        (32, 576, (2048, 1)),
        (32, 4096, (2048, 2)),
    ],
)
def test_the_prefix_is_cut_where_programs_would_leave_multiprocessors_idle(B, T, split):
    """Of the 8B model with 10 candidates on 132 multiprocessors: 8 heads, 40 query rows in blocks of 64."""
    assert tree_attention.split_prefix(B * 8, 40, T, tree_attention.least_leaf(64), 132) == split


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    """A driver that says H100 and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> object:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    # Not set_active: its way back asks for a real driver.
    monkeypatch.setattr(driver, "_active", Driver())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_launches_compile_as_they_are_called(name, no_gpu, monkeypatch):
    """From the wrapper through Triton's own specialisation of the arguments to machine code, all but the launch."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def compile_only(
        self: object, *arguments: object, grid: object, warmup: bool, **options: object
    ) -> object:
        compiled.append(self.fn.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    launch = SPECS[name].kernel.launch
    for shape in SPECS[name].shapes:
        if shape.get("k", 0) <= MAX_K:
            launch(*SPECS[name].make_inputs(shape, torch.bfloat16).values())
    assert set(compiled) == {kernel.name for kernel in SPECS[name].kernels}


def test_the_page_lists_every_kernel_and_signature():
    text = kernel_table.PAGE.read_text(encoding="utf-8")
    for op, kernel, signature in (
        x for arch in kernel_table.SHARED_LIMIT for x in kernel_table.signatures(arch)
    ):
        assert f"`{op}`" in text
        assert f"`{kernel}`" in text
        assert kernel_table.label(signature) in text, "run: python -m benchmarks.ops.kernel_table"


def test_every_kernel_has_a_spec_and_every_spec_a_kernel():
    for path in KERNELS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # What a launch brackets with a grid.
        launched = {
            node.func.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        }
        assert launched == {kernel.name for kernel in SPECS[path.parent.name].kernels}
    assert len(KERNELS) == len(SPECS)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_every_masked_load_names_what_stands_for_the_rest(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            named = {keyword.arg for keyword in node.keywords}
            assert ("mask" in named) == ("other" in named), ast.unparse(node)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_nothing_makes_the_host_wait(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero"}, (
                ast.unparse(node)
            )


def known(op: str, kernel: str, configuration: dict[str, object], arch: int = 90) -> None:
    own = (k for k in SPECS[op].kernels if k.name == kernel and (not k.archs or arch in k.archs))
    want = {name: str(value) for name, value in configuration.items()}
    assert any(want.items() <= signature.items() for k in own for signature in k.signatures), (
        op,
        kernel,
        want,
    )


def test_topk_says_what_it_takes():
    assert triton_limit(256, 524288) == ""
    assert triton_limit(128, MAX_V) == ""
    assert "takes k <= 256, not 257" in triton_limit(257, 524288)
    assert "takes k <= 128 for V=524289, not 129" in triton_limit(129, 524289)
    assert "takes V <= 2097152" in triton_limit(1, 1 << 22)


def test_what_is_launched_is_compiled():
    """The configurations that the launches choose, from one end to the other, are among the signatures."""
    for D in (64, 128, 256):
        known("commit", "commit_kernel", SPECS["commit"].kernel.configuration(D))
        known("tree_attention", "tree_attention_merge_kernel", tree_attention.merge_configuration(D, 1))
        known("tree_attention", "tree_attention_merge_kernel", tree_attention.merge_configuration(128, 0))
        for arch in (75, 80, 89, 90, 100, 120):
            table = max((known for known in tree_attention.TILES if known <= arch), default=80)
            for rows in (1, 16, 17, 40, 64, 65, 160, 1024):
                for mode in tree_attention.MODES:
                    settings = tree_attention.configuration(D, rows, mode, torch.bfloat16, arch)
                    known("tree_attention", "tree_attention_kernel", settings | {"LEAVES": 0}, table)
                settings = tree_attention.configuration(D, rows, tree_attention.ALONE, torch.bfloat16, arch)
                known("tree_attention", "tree_attention_kernel", settings | {"LEAVES": 1}, table)
                settings = tree_attention.configuration(D, rows, tree_attention.ALONE, torch.float32, arch)
                known("tree_attention", "tree_attention_kernel", settings, table)
    for K in (1, 10, 64, 65, 512, 513, 256000):
        known("resample", "resample_kernel", SPECS["resample"].kernel.configuration(K))
    for K in (1, 4, 5, 40, 65, 512, 513, 2000):
        for E in (16, 128, 129, 4096):
            known(
                "score_and_sample",
                "score_and_sample_kernel",
                SPECS["score_and_sample"].kernel.configuration(K, E),
            )
    for mode in MODES:
        for weight in WEIGHTS:
            known(
                "partial_bt_loss",
                "pair_kernel",
                SPECS["partial_bt_loss"].kernel.pair_configuration(mode, weight),
            )
    for K in (1, 10, 64, 65, 4096, 256000):
        known("finish_step", "finish_step_kernel", SPECS["finish_step"].kernel.configuration(K))
    known("partial_bt_loss", "sum_kernel", SPECS["partial_bt_loss"].kernel.sum_configuration())
    for V in (1, 100, 32000, 128256, 151936, 262144, 262208, 600000, MAX_V):
        known("topk_logprobs", "topk_segment_kernel", topk_logprobs.segment_configuration(V))
        for k in (1, 10, 40, 100, 256):
            few = min(k, largest_k(V), V)
            known("topk_logprobs", "topk_merge_kernel", topk_logprobs.merge_configuration(V, few))


TOPK = [
    (kernel, signature) for op, kernel, signature, arch in SIGNATURES if (op, arch) == ("topk_logprobs", 90)
]


@pytest.mark.parametrize(
    ("kernel", "signature"),
    daily([entry for entry in TOPK if entry[1].get("num_warps") == "1"], partial(shows, "topk_logprobs")),
    ids=name_of,
)
def test_the_kernels_of_topk_are_cheap_by_their_machine_code(kernel, signature):
    """What their speed rests on: no barrier in the pass over the logits, few instructions, wide loads."""
    counts = instructions.counts_of("topk_logprobs", kernel, signature, 90)
    if kernel == "topk_segment_kernel":
        bits = 128 if signature["p_guidance"] == "None" else 32
        assert not counts.loops
        assert counts.straight.barriers == 0
        assert counts.straight.instructions < 24 * 32  # a thread's logits
        assert sum(n for width, n in counts.loads.items() if width < 128) <= (bits == 32)
    else:
        # Every step of the search is one exchange within the warp; barriers are between the levels alone.
        assert counts.straight.barriers == 3
        assert all(loop.exchanges == 1 and not loop.barriers for loop in counts.loops[:-1])


@pytest.mark.parametrize(
    "signature",
    daily(
        [
            (signature,)
            for kernel, signature in TOPK
            if kernel == "topk_segment_kernel" and signature["p_guidance"] == "None"
        ],
        partial(shows, "topk_logprobs", "topk_segment_kernel"),
    ),
    ids=name_of,
)
def test_topk_keeps_nan_when_it_compares(signature):
    """The interpreter's maxima keep NaN whatever the kernel says; the instruction must say it."""
    ptx = kernel_table.build("topk_logprobs", "topk_segment_kernel", signature, 90).asm["ptx"]
    assert set(re.findall(r"\bmax\.(\S+)", ptx)) == {"NaN.f32", "s32"}
