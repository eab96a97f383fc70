// A tensor as it comes from Python: (address, dtype, sizes, strides), or None.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace pybind11::detail {

template <>
struct type_caster<fastkd::Tensor> {
  PYBIND11_TYPE_CASTER(fastkd::Tensor, const_name("tuple[int, int, tuple, tuple] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject* sizes = PyTuple_GET_ITEM(source.ptr(), 2);
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t ndim = PyTuple_GET_SIZE(sizes);
    if (ndim > fastkd::kMaxDims || PyTuple_GET_SIZE(strides) != ndim) return false;
    value.data = static_cast<char*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0)));
    value.dtype = fastkd::DType(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1)));
    value.ndim = int(ndim);
    for (Py_ssize_t d = 0; d < ndim; ++d) {
      value.sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, d));
      value.strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, d));
    }
    return PyErr_Occurred() == nullptr;
  }
};

}  // namespace pybind11::detail
