// The instruction set in use, chosen once by cpuid. RGTG_DISPATCH(isa, call) expands to the call in the namespace of
// that instruction set.
#pragma once

namespace rgtg {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best instruction set of this machine, or the one that the environment variable RGTG_FAST_ISA names.
// Throws std::runtime_error where this machine or this build does not have it.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace rgtg

// clang-format off
#ifdef RGTG_X86
#define RGTG_DISPATCH(isa, ...)                          \
  do {                                                   \
    switch (isa) {                                       \
      case ::rgtg::kAvx512Bf16:                          \
        ::rgtg::avx512bf16::__VA_ARGS__;                 \
        break;                                           \
      case ::rgtg::kAvx512:                              \
        ::rgtg::avx512::__VA_ARGS__;                     \
        break;                                           \
      case ::rgtg::kAvx2:                                \
        ::rgtg::avx2::__VA_ARGS__;                       \
        break;                                           \
      default:                                           \
        ::rgtg::generic::__VA_ARGS__;                    \
    }                                                    \
  } while (0)
// Declares a kernel in the namespace of every instruction set.
#define RGTG_DECLARE(...)                \
  namespace rgtg {                       \
  namespace generic { __VA_ARGS__; }     \
  namespace avx2 { __VA_ARGS__; }        \
  namespace avx512 { __VA_ARGS__; }      \
  namespace avx512bf16 { __VA_ARGS__; }  \
  }
#else
#define RGTG_DISPATCH(isa, ...) ::rgtg::generic::__VA_ARGS__
#define RGTG_DECLARE(...)            \
  namespace rgtg {                   \
  namespace generic { __VA_ARGS__; } \
  }
#endif
// clang-format on
