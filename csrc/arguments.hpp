// The arguments that Python passes, and their checks. Kernels do not check: everything that a kernel reads of a tensor
// (address, dtype, shape, strides) comes from that tensor, and a bind function compares them with one another. Where they
// do not fit it throws std::invalid_argument, a ValueError in Python, before anything is written.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common.hpp"

namespace rgtg {

// Address of the first number, dtype code, shape, and strides in elements: `array` of rgtg_fast/ops/_extension.py.
using Array = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;

inline uintptr_t address(const Array& a) { return std::get<0>(a); }
inline int dtype(const Array& a) { return std::get<1>(a); }
inline const std::vector<int64_t>& shape(const Array& a) { return std::get<2>(a); }
inline int64_t size(const Array& a, size_t d) { return std::get<2>(a)[d]; }
inline int64_t stride(const Array& a, size_t d) { return std::get<3>(a)[d]; }

template <class T>
T* memory(const Array& a) {
  return reinterpret_cast<T*>(address(a));
}

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

template <class Sizes>
std::string listed(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t n : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

inline bool is_empty(const Array& a) {
  for (int64_t n : shape(a)) {
    if (n == 0) return true;
  }
  return false;
}

// `rank` dimensions, and memory.
inline void expect_rank(const Array& a, const char* name, size_t rank) {
  if (shape(a).size() != rank || std::get<3>(a).size() != rank) {
    refuse(std::string(name) + " has shape " + listed(shape(a)) + ": use " + std::to_string(rank) + " dimensions");
  }
  for (size_t d = 0; d < rank; ++d) {
    if (size(a, d) < 0 || stride(a, d) < 0) refuse(std::string(name) + " has a negative size or stride");
  }
  if (!is_empty(a) && address(a) == 0) refuse(std::string(name) + " has no memory: its storage was freed");
}

inline void expect_dtype(const Array& a, const char* name, int code) {
  if (dtype(a) != code) {
    refuse(std::string(name) + " has dtype code " + std::to_string(dtype(a)) + ": use " + std::to_string(code));
  }
}

inline void expect(const Array& a, const char* name, int code, std::initializer_list<int64_t> sizes) {
  expect_rank(a, name, sizes.size());
  expect_dtype(a, name, code);
  size_t d = 0;
  for (int64_t n : sizes) {
    if (size(a, d++) != n) refuse(std::string(name) + " has shape " + listed(shape(a)) + ": use " + listed(sizes));
  }
}

// The last dimension is contiguous. The strides of an empty tensor mean nothing.
inline void expect_dense(const Array& a, const char* name) {
  const size_t last = shape(a).size() - 1;
  if (size(a, last) > 1 && stride(a, last) != 1 && !is_empty(a)) {
    refuse(std::string(name) + " has stride " + std::to_string(stride(a, last)) + " in its last dimension: use 1");
  }
}

// Contiguous in the order of the indices.
inline void expect_contiguous(const Array& a, const char* name) {
  int64_t next = 1;
  if (is_empty(a)) return;
  for (size_t d = shape(a).size(); d-- > 0;) {
    if (size(a, d) > 1 && stride(a, d) != next) refuse(std::string(name) + " is not contiguous");
    next *= size(a, d);
  }
}

inline void expect_contiguous(const Array& a, const char* name, int code, std::initializer_list<int64_t> sizes) {
  expect(a, name, code, sizes);
  expect_contiguous(a, name);
}

// No two numbers share memory by a stride of 0: the kernel writes here.
inline void expect_apart(const Array& a, const char* name) {
  for (size_t d = 0; d < shape(a).size(); ++d) {
    if (size(a, d) > 1 && stride(a, d) == 0 && !is_empty(a)) {
      refuse(std::string(name) + " is written and has a stride of 0");
    }
  }
}

// `slots`, of a cache of so many: [rows] int64, each one of them and, if `distinct`, no two the same.
inline void expect_slots(const Array& slots, int64_t rows, int64_t count, bool distinct) {
  expect_contiguous(slots, "slots", kInt64, {rows});
  std::vector<bool> named(distinct ? static_cast<size_t>(count) : 0);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t slot = memory<int64_t>(slots)[b];
    if (slot < 0 || slot >= count) refuse("a slot is outside the cache");
    if (!distinct) continue;
    if (named[static_cast<size_t>(slot)]) refuse("two rows have one slot");
    named[static_cast<size_t>(slot)] = true;
  }
}

inline void expect_float(const Array& a, const char* name, bool half) {
  const int code = dtype(a);
  if (code != kFloat32 && code != kBFloat16 && !(half && code == kFloat16)) {
    refuse(std::string(name) + " has dtype code " + std::to_string(code) + ", which the kernel does not take");
  }
}

}  // namespace rgtg
