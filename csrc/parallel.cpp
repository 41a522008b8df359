// A small thread pool: workers spin for some microseconds (a decode step calls kernels back to back), then sleep.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "common.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace rgtg {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins that a waiting thread makes before it yields its core, so that an oversubscribed machine still progresses.
constexpr int kSpinsBeforeYield = 4000;
// Spins of an idle worker before it sleeps on the condition variable (about 50 microseconds).
constexpr int kSpinsBeforeSleep = 2000;

class Pool {
 public:
  void run(int threads, ParallelFn fn, void* ctx) {
    if (threads <= 1) {
      fn(ctx, 0, 1);
      return;
    }
    std::lock_guard<std::mutex> one_caller(caller_);
    grow(threads - 1);
    fn_ = fn;
    ctx_ = ctx;
    threads_ = threads;
    // Every worker answers every epoch, also those with no share in it: an unanswered one could read the next job's
    // fields half written.
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load() > 0) wake_.notify_all();
    fn(ctx, 0, threads);
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpinsBeforeYield) pause();
      else std::this_thread::yield();
    }
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(workers_.size()) < workers) {
      int index = static_cast<int>(workers_.size()) + 1;
      uint64_t seen = epoch_.load();
      workers_.emplace_back([this, index, seen] { work(index, seen); });
      workers_.back().detach();
    }
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpinsBeforeSleep) {
          pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      ++seen;
      if (index < threads_) fn_(ctx_, index, threads_);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex caller_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  ParallelFn fn_ = nullptr;
  void* ctx_ = nullptr;
  int threads_ = 0;
};

// Never destroyed: its detached workers may still wait on it while the process ends. A forked child has no workers
// and starts with a pool of its own.
Pool* pool = new Pool;

struct ForkHandler {
  ForkHandler() {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  }
} fork_handler;

}  // namespace

void parallel(int threads, ParallelFn fn, void* ctx) { pool->run(threads, fn, ctx); }

void barrier(BarrierState* state, int threads) {
  if (threads <= 1) return;
  int generation = __atomic_load_n(&state->generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&state->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&state->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&state->generation, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&state->generation, __ATOMIC_ACQUIRE) == generation; ++spins) {
    if (spins < kSpinsBeforeYield) pause();
    else std::this_thread::yield();
  }
}

}  // namespace rgtg
