// The instruction set in use, chosen once by cpuid. RGTG_DISPATCH(isa, call) expands to the call in the namespace of
// that instruction set.
#pragma once

namespace rgtg {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best instruction set of this machine, or the one that the environment variable RGTG_FAST_ISA names.
// Throws std::runtime_error where this machine or this build does not have it.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace rgtg

// clang-format off
#ifdef RGTG_X86
// Compilers without AMX build the other instruction sets.
#ifdef RGTG_AMX
#define RGTG_AMX_CASE(...)      \
  case ::rgtg::kAmx:            \
    ::rgtg::amx::__VA_ARGS__;   \
    break;
#define RGTG_AMX_NAMESPACE(...) \
  namespace amx { __VA_ARGS__; }
#else
#define RGTG_AMX_CASE(...)
#define RGTG_AMX_NAMESPACE(...)
#endif
#define RGTG_DISPATCH(isa, ...)                          \
  do {                                                   \
    switch (isa) {                                       \
      RGTG_AMX_CASE(__VA_ARGS__)                         \
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
  RGTG_AMX_NAMESPACE(__VA_ARGS__)        \
  }
#else
#define RGTG_DISPATCH(isa, ...) ::rgtg::generic::__VA_ARGS__
#define RGTG_DECLARE(...)            \
  namespace rgtg {                   \
  namespace generic { __VA_ARGS__; } \
  }
#endif
// clang-format on
