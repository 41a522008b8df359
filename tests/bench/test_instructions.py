"""What oneDNN and MKL say of the products of torch, in lines that they wrote on several processors."""

import subprocess

import pytest

from rgtg_fast.bench import instructions

AMX = """\
onednn_verbose,v1,info,oneDNN v3.12.0 (commit 80afa71049cd69a3df32adcccb623b12cd7baa22)
onednn_verbose,v1,info,cpu,isa:Intel AVX10.1 and Intel AMX with bfloat16 and 8-bit integer support
onednn_verbose,v1,primitive,info,template:operation,engine,primitive,implementation,prop_kind,memory_descriptors
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16::blocked:ab::f0 \
wei:bf16::blocked:ba::f0 dst:bf16::blocked:ab::f0,attr-scratchpad:user,,64x256:256x256,10.2461
MKL_VERBOSE oneMKL 2024.0 Update 2 Product build 20240605 for Intel(R) 64 architecture Intel(R) Advanced Vector \
Extensions 512 (Intel(R) AVX-512) with support for INT8, BF16, FP16 (limited) instructions, and Intel(R) Advanced \
Matrix Extensions (Intel(R) AMX) with INT8 and BF16, Lnx 2.10GHz lp64 gnu_thread
MKL_VERBOSE SGEMM(T,N,256,64,256,0x7ffe4c342210,0x55a0e11a0ec0,256,0x55a0e1190e40,256) 8.00ms CNR:OFF TID:0  NThr:2
"""
AVX2 = """\
MKL_VERBOSE oneMKL 2024.0 Update 2 Product build 20240605 for Intel(R) 64 architecture Intel(R) Advanced Vector \
Extensions 2 (Intel(R) AVX2) enabled processors, Lnx 2.10GHz lp64 gnu_thread
MKL_VERBOSE SGEMM(T,N,256,64,256,0x7ffe419df820,0x55564b1f46c0,256) 8.01ms CNR:OFF Dyn:1 FastMM:1 TID:0  NThr:2
"""
# Reorders come before a product, older versions write "src_" and name another primitive.
OLDER = """\
onednn_verbose,exec,cpu,reorder,jit:uni,undef,src_f32::blocked:ab:f0 dst_bf16::blocked:ab:f0,,,64x256,0.02
onednn_verbose,exec,cpu,inner_product,brgemm:avx512_core_bf16,forward_inference,src_bf16::blocked:ab:f0,,,mb64,0.1
onednn_verbose,exec,cpu,matmul,gemm:acl,undef,src_f32::blocked:ab:f0 wei_f32::blocked:ab:f0,,,64x256:256x256,0.2
"""
PLAIN = """\
MKL_VERBOSE oneMKL 2024.0 Product build 20240605 for Intel(R) 64 architecture processors, Lnx 2.60GHz lp64 gnu_thread
MKL_VERBOSE SGEMM(T,N,256,64,256,0x7ffe419df820) 8.01ms CNR:OFF Dyn:1 FastMM:1 TID:0  NThr:2
MKL_VERBOSE GEMM_BF16BF16F32(T,N,256,64,256,0x7ffe419df820) 8.01ms CNR:OFF Dyn:1 FastMM:1 TID:0  NThr:2
"""


@pytest.fixture(autouse=True)
def asked_anew():
    instructions.torch_products.cache_clear()
    yield
    instructions.torch_products.cache_clear()


@pytest.mark.parametrize(
    ("report", "found"),
    [
        (AMX, "bf16 brg_matmul:avx10_1_512_amx; fp32 mkl:avx512"),
        (AVX2, "fp32 mkl:avx2"),
        (OLDER, "bf16 brgemm:avx512_core_bf16; fp32 gemm:acl"),
        (PLAIN, "bf16 mkl; fp32 mkl"),
        ("nothing of theirs", None),
        ("", None),
    ],
    ids=["amx", "avx2", "older", "plain", "others", "nothing"],
)
def test_the_lines_name_the_instructions_of_both_dtypes(report, found):
    assert instructions.products_in(report) == found


def test_the_libraries_are_asked_once_with_what_makes_them_talk(monkeypatch):
    calls = []

    def run(command, env, **_):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0, stdout=AMX)

    monkeypatch.setattr(instructions.subprocess, "run", run)
    assert instructions.torch_products() == instructions.torch_products() == instructions.products_in(AMX)
    ((_, environment),) = calls
    assert environment["ONEDNN_VERBOSE"] == environment["MKL_VERBOSE"] == "1"
    assert "PATH" in environment, "and the rest of the environment, which may limit the instructions"


@pytest.mark.parametrize(
    "error",
    [OSError("no such file"), subprocess.TimeoutExpired("python", 1), subprocess.CalledProcessError(1, "x")],
    ids=lambda error: type(error).__name__,
)
def test_where_the_process_fails_nothing_is_known(monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(instructions.subprocess, "run", run)
    assert instructions.torch_products() is None


@pytest.mark.slow
def test_torch_is_really_asked():
    """A torch without oneDNN and MKL says nothing; with one of them the products of a dtype have a name."""
    found = instructions.torch_products()
    assert found is None or found.startswith(("bf16 ", "fp32 "))
