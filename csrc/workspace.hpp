// Memory that a host thread keeps between calls: allocating pages takes longer than a small call.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace rgtg {

class Workspace {
 public:
  // At least `bytes`, 64-byte aligned, with the contents of the last call.
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
