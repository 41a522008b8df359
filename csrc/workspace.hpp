// Memory that a host thread keeps between its calls: fresh pages would cost more than many a call itself.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace rgtg {

class Workspace {
 public:
  // At least `bytes`, 64-byte aligned, with whatever the last call left in them.
  void* of(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

}  // namespace rgtg
