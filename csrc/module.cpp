// Python bindings: addresses, shapes, strides in elements, dtype codes. Each op has a bind_<op> function
// (csrc/bind_<op>.cpp), called here.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef RGTG_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <pybind11/pybind11.h>

#include "bindings.hpp"
#include "isa.hpp"

namespace rgtg {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

#ifdef RGTG_AMX
// Whether the machine has tiles of bf16 and the operating system lets this process use their registers, which it has to
// be asked for.
bool amx_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa best_isa() {
#ifdef RGTG_AMX
  // Asked for here in every build: one for tests compiles the tiles' kernels as the only ones.
  [[maybe_unused]] const bool amx = amx_allowed();
#endif
#ifdef RGTG_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef RGTG_AMX
  if (bf16 && amx) return kAmx;
#endif
  if (bf16) return kAvx512Bf16;
  if (avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kGeneric;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[isa]; }

Isa current_isa() {
  static const Isa best = best_isa();
  const char* asked = std::getenv("RGTG_FAST_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  // The former name of "generic".
  if (std::strcmp(asked, "plain") == 0) return kGeneric;
  for (int i = 0; i <= kAmx; ++i) {
    if (std::strcmp(asked, kNames[i]) != 0) continue;
    if (i <= best) return static_cast<Isa>(i);
    throw std::runtime_error(std::string("RGTG_FAST_ISA=") + asked + " is not available here (best: " + kNames[best] +
                             "): unset it or name a lower one");
  }
  throw std::runtime_error(std::string("RGTG_FAST_ISA=") + asked +
                           " is unknown: use generic, avx2, avx512, avx512bf16 or amx");
}

}  // namespace rgtg

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of rgtg_fast.";
  m.def("isa", [] { return rgtg::isa_name(rgtg::current_isa()); }, "The instruction set in use.");
  rgtg::bind_all(m);
}
