// One bind function per kernel, each in its own bind_<op>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace rgtg {

void bind_linear(pybind11::module_& m);

inline void bind_all(pybind11::module_& m) { bind_linear(m); }

}  // namespace rgtg
