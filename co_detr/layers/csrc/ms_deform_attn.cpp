// Operator schemas, and an empty Python module whose import registers them with their kernels.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "ms_deform_attn_torch.h"

CO_DETR_LIBRARY(co_detr, m) {
  // level_shapes = height and width of every level in turn: plain integers, so that no kernel
  // has to wait for the device to learn them. deterministic: see the docstring in Python.
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] level_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] level_shapes, "
      "Tensor sampling_locations, Tensor attention_weights, bool deterministic) "
      "-> (Tensor, Tensor, Tensor)");
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Kernels of co_detr, see torch.ops.co_detr.", -1,
      nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
