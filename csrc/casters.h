// How what Python passes becomes what the kernels take.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <tuple>
#include <type_traits>

#include "place.h"
#include "tensor.h"

namespace fastkd {

// The dtype that prints as torch's does; there is one object of each, for good.
inline bool read_dtype(pybind11::handle from, DType& to) {
  constexpr const char* kNames[] = {"torch.float32", "torch.float16", "torch.bfloat16",
                                    "torch.float64", "torch.int32",   "torch.int64",
                                    "torch.uint8"};
  static PyObject* known[std::size(kNames)] = {};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (from.ptr() == known[i]) return to = DType(i), true;
  const std::string name = pybind11::str(from);
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return known[i] = from.inc_ref().ptr(), to = DType(i), true;
  return false;
}

// What kernels see of an object with the attributes `dtype` and `shape`, and the methods `data_ptr`
// and `stride`; nothing of None.
inline bool read_tensor(pybind11::handle from, Tensor& to) {
  using pybind11::reinterpret_steal, pybind11::object;
  static PyObject* const kAddress = PyUnicode_InternFromString("data_ptr");
  static PyObject* const kDType = PyUnicode_InternFromString("dtype");
  static PyObject* const kSizes = PyUnicode_InternFromString("shape");
  static PyObject* const kStrides = PyUnicode_InternFromString("stride");
  if (from.is_none()) return true;
  const auto call = [&](PyObject* name) {
    return reinterpret_steal<object>(PyObject_CallMethodNoArgs(from.ptr(), name));
  };
  const auto get = [&](PyObject* name) {
    return reinterpret_steal<object>(PyObject_GetAttr(from.ptr(), name));
  };
  const object address = call(kAddress), dtype = get(kDType), sizes = get(kSizes),
               strides = call(kStrides);
  if (!address || !dtype || !sizes || !strides) throw pybind11::error_already_set();
  if (!PyTuple_Check(sizes.ptr()) || !PyTuple_Check(strides.ptr())) return false;
  const Py_ssize_t ndim = PyTuple_GET_SIZE(sizes.ptr());
  if (ndim > kMaxDims || PyTuple_GET_SIZE(strides.ptr()) != ndim) return false;
  if (!read_dtype(dtype, to.dtype)) return false;
  to.data = static_cast<char*>(PyLong_AsVoidPtr(address.ptr()));
  to.ndim = int(ndim);
  for (Py_ssize_t d = 0; d < ndim; ++d) {
    to.sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), d));
    to.strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), d));
  }
  return PyErr_Occurred() == nullptr;
}

}  // namespace fastkd

namespace pybind11::detail {

template <>
struct type_caster<fastkd::Tensor> {
  PYBIND11_TYPE_CASTER(fastkd::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) { return fastkd::read_tensor(source, value); }
};

// A list or a tuple.
template <>
struct type_caster<fastkd::Tensors> {
  PYBIND11_TYPE_CASTER(fastkd::Tensors, const_name("Sequence[torch.Tensor | None]"));

  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr()) && !PyTuple_Check(source.ptr())) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(source.ptr());
    value.resize(size_t(count));
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!fastkd::read_tensor(PySequence_Fast_GET_ITEM(source.ptr(), i), value[size_t(i)]))
        return false;
    return true;
  }
};

// (device, stream or number of threads).
template <>
struct type_caster<fastkd::Place> {
  PYBIND11_TYPE_CASTER(fastkd::Place, const_name("tuple[int, int]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    value.device = int(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
    value.handle = uintptr_t(PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1)));
    return PyErr_Occurred() == nullptr;
  }
};

}  // namespace pybind11::detail

namespace fastkd {

// A field's value: a choice is known by its name.
template <class T>
T from_python(const pybind11::handle& value) {
  if constexpr (std::is_enum_v<T>) {
    const auto names = names_of(T{});
    const std::string wanted = value.cast<std::string>();
    for (size_t i = 0; i < names.size(); ++i)
      if (wanted == names[i]) return T(i);
    throw pybind11::value_error("unknown choice: " + wanted);
  } else {
    return value.cast<T>();
  }
}

template <class T>
pybind11::object to_python(const T& value) {
  if constexpr (std::is_enum_v<T>)
    return pybind11::str(names_of(value)[size_t(value)]);
  else
    return pybind11::cast(value);
}

// A class of immutable objects with the struct's fields, all of which its constructor takes by
// name.
template <class Struct>
void bind_parameters(pybind11::module_& m, const char* name) {
  pybind11::class_<Struct> bound(m, name);
  bound.def(pybind11::init([](const pybind11::kwargs& values) {
    Struct made{};
    const auto fill = [&](const auto&... field) {
      ((made.*field.member =
            from_python<std::decay_t<decltype(made.*field.member)>>(values[field.name])),
       ...);
      return sizeof...(field);
    };
    if (std::apply(fill, Struct::fields()) != values.size())
      throw pybind11::type_error("an argument is no field of the struct");
    return made;
  }));
  const auto bind = [&](const auto&... field) {
    (bound.def_property_readonly(
         field.name,
         [member = field.member](const Struct& made) { return to_python(made.*member); }),
     ...);
  };
  std::apply(bind, Struct::fields());
}

}  // namespace fastkd
