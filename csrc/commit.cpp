#include "commit.hpp"

#include <cstring>

namespace rgtg {
namespace {

// Bytes that are worth a thread of their own.
constexpr int64_t kWorthAThread = 1 << 18;

int64_t slot_of(const Commit& a, int64_t row) { return a.slots == nullptr ? row : a.slots[row]; }

void move(const LayersView& from, const LayersView& to, int64_t layer, int64_t row, int64_t slot, int64_t head,
          int64_t source, int64_t target, int64_t bytes) {
  // memmove: the memory is the same where new tokens are a window of the cache.
  std::memmove(to.data + layer * to.layer + slot * to.row + head * to.head + target * to.token,
               from.data + layer * from.layer + row * from.row + head * from.head + source * from.token, bytes);
}

}  // namespace

bool commit(const Commit& a, int threads) {
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t choice = a.choice[b], length = a.lengths[slot_of(a, b) * a.lengths_stride];
    if (choice < -1 || choice >= a.S) return false;
    if (choice >= 0 && (length < 0 || length >= a.T)) return false;
  }
  const int64_t most = a.L * a.B * a.G * a.bytes * 2 / kWorthAThread + 1;
  if (threads > most) threads = static_cast<int>(most);
  auto body = [&](int thread, int count) {
    const Range mine = share(a.L * a.B, thread, count);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t layer = i / a.B, row = i % a.B, choice = a.choice[row];
      if (choice < 0) continue;
      const int64_t slot = slot_of(a, row), length = a.lengths[slot * a.lengths_stride];
      for (int64_t head = 0; head < a.G; ++head) {
        move(a.k_new, a.k_cache, layer, row, slot, head, choice, length, a.bytes);
        move(a.v_new, a.v_cache, layer, row, slot, head, choice, length, a.bytes);
      }
    }
  };
  parallel_for(threads, body);
  for (int64_t b = 0; b < a.B; ++b) a.lengths[slot_of(a, b) * a.lengths_stride] += a.choice[b] >= 0;
  return true;
}

}  // namespace rgtg
