// One bind function per kernel, each in its own bind_<op>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace rgtg {

void bind_linear(pybind11::module_& m);
void bind_decoder_layers(pybind11::module_& m);
void bind_tree_attention(pybind11::module_& m);
void bind_topk_logprobs(pybind11::module_& m);
void bind_resample(pybind11::module_& m);
void bind_commit(pybind11::module_& m);
void bind_partial_bt_loss(pybind11::module_& m);

inline void bind_all(pybind11::module_& m) {
  bind_linear(m);
  bind_tree_attention(m);
  bind_commit(m);
  bind_resample(m);
  bind_topk_logprobs(m);
  bind_partial_bt_loss(m);
  bind_decoder_layers(m);
}

}  // namespace rgtg
