// One bind function per kernel, each in its own bind_<op>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace rgtg {

inline void bind_all(pybind11::module_& m) { (void)m; }

}  // namespace rgtg
