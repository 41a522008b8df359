// Types and tables shared by every kernel of the CPU extension.
//
// Each kernel file (csrc/<op>.cpp) is compiled once per instruction set with -DRGTG_ISA=<name>; its code lives in
// namespace rgtg::RGTG_ISA, so the copies never collide. Such a file must not instantiate templates of the standard
// library: the linker keeps one copy of an inline function for the whole extension, and the kept copy could be the
// one with AVX-512 instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rgtg {

// The dtype codes that Python passes (rgtg_fast/ops/_extension.py holds the same table).
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt64 = 4, kInt8 = 5 };

static inline int dtype_bytes(int dtype) {
  return dtype == kInt8 ? 1 : dtype >= kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// Runs fn(ctx, thread, threads) once on each of `threads` threads and returns when all are done. The calling thread
// is thread 0. Calls from different host threads are serialised.
using ParallelFn = void (*)(void* ctx, int thread, int threads);
void parallel(int threads, ParallelFn fn, void* ctx);

// Waits, inside a function run by parallel(), until every one of its threads has arrived. `state` starts zeroed and
// may be reused for any number of barriers within one parallel() call.
struct BarrierState {
  alignas(64) int arrived;
  alignas(64) int generation;
};
void barrier(BarrierState* state, int threads);

// The items [begin, end) of n that one thread computes.
struct Range {
  int64_t begin, end;
};
__attribute__((always_inline)) inline Range share(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

// The same with a callable (int thread, int threads), without std::function.
template <class Body>
inline void parallel_for(int threads, Body& body) {
  parallel(threads, [](void* ctx, int thread, int n) { (*static_cast<Body*>(ctx))(thread, n); }, &body);
}

}  // namespace rgtg
