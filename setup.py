"""Builds the optional CPU extension; everything else is in pyproject.toml.

The extension needs pybind11 and a C++17 compiler, but not torch. Where it cannot be built, the install continues
without it: the reference implementations run, and the package warns at their first use.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# Kernel files, compiled once per instruction set.
KERNELS = sorted(p.stem for p in (ROOT / "csrc").glob("*.cpp") if "RGTG_ISA" in p.read_text(encoding="utf-8"))
# Files compiled once, for any machine.
COMMON = sorted(p.stem for p in (ROOT / "csrc").glob("*.cpp") if p.stem not in KERNELS)

# RGTG_FAST_REQUIRE_EXTENSION=1 makes a failed build an error.
REQUIRED = os.environ.get("RGTG_FAST_REQUIRE_EXTENSION") == "1"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# No contraction: a * b + c is rounded twice unless fma() is written, so that every instruction set orders candidates
# as the reference does.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-g0",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {"generic": []}
if X86:
    ISA_FLAGS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [*AVX512, "-mprefer-vector-width=512"],
        "avx512bf16": [*AVX512, "-mavx512bf16", "-mprefer-vector-width=512"],
    }
    if sys.platform == "linux":
        ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]

# Apple's linker does not know -s (strip symbols).
LINK_FLAGS = ["-pthread"] if sys.platform == "darwin" else ["-pthread", "-s"]

# For tests: RGTG_FAST_SANITIZE=address,undefined builds the kernels with sanitizers, for the one instruction set that
# RGTG_FAST_ISA names (default: generic), which builds faster.
SANITIZE = os.environ.get("RGTG_FAST_SANITIZE")
if SANITIZE:
    checks = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    # Prefetching computes addresses that are never read; leaving out the other checks makes the bindings compile three
    # times as fast.
    checks += ["-fno-sanitize=pointer-overflow,null,alignment,vptr"] if "undefined" in SANITIZE else []
    isa = os.environ.get("RGTG_FAST_ISA") or "generic"
    # "plain" is the former name of "generic".
    X86, ISA_FLAGS = False, {"generic": ISA_FLAGS["generic" if isa == "plain" else isa]}
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", *checks]
    # The process asks for the tiles' registers.
    FLAGS += ["-DRGTG_AMX=1"] if isa == "amx" else []
    LINK_FLAGS = ["-pthread", *checks]


class BuildExtension(build_ext):
    """Compiles every kernel file once per instruction set and never fails the install."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if REQUIRED:
                raise
            print(f"rgtg_fast: built without its C++ kernels ({error})", file=sys.stderr)

    def accepts(self, flags):
        """Whether the compiler knows the flags: AMX came with gcc 11 and clang 12."""
        empty = Path(self.build_temp) / "empty.cpp"
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.write_text("", encoding="utf-8")
        try:
            self.compiler.compile([str(empty)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            return False
        return True

    def build_extension(self, ext):
        import pybind11

        flags = dict(ISA_FLAGS)
        if "amx" in flags and not self.accepts(flags["amx"]):
            del flags["amx"]
        jobs = [(stem, None) for stem in COMMON] + [(stem, isa) for stem in KERNELS for isa in flags]
        macros = [("RGTG_X86", "1")] if X86 else []
        macros += [("RGTG_AMX", "1")] if "amx" in flags else []

        def compiled(job):
            stem, isa = job
            return self.compiler.compile(
                [str(Path("csrc") / f"{stem}.cpp")],
                output_dir=str(Path(self.build_temp) / (isa or "common")),
                include_dirs=["csrc", pybind11.get_include(), *self.compiler.include_dirs],
                macros=macros + ([("RGTG_ISA", isa)] if isa else []),
                extra_postargs=FLAGS + (flags[isa] if isa else []),
                depends=[str(p) for p in Path("csrc").glob("*.hpp")],
            )

        for isa in ("common", *flags):
            (Path(self.build_temp) / isa / "csrc").mkdir(parents=True, exist_ok=True)
        # Compilers are separate processes, so threads use every core.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compiled, jobs) for name in names]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, target_lang="c++", extra_postargs=LINK_FLAGS, build_temp=self.build_temp
        )


sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("*.cpp"))]
setup(
    ext_modules=[Extension("rgtg_fast._C", sources, optional=not REQUIRED)],
    cmdclass={"build_ext": BuildExtension},
)
