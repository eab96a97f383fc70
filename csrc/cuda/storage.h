// One tensor's elements, whose dtype the kernel knows when it is compiled, or not.
#pragma once

#include "device.h"

namespace fastkd::cuda {

// Storage of any dtype.
struct Any;

// f(null pointer of the storage type): S, or what the dtype says where S is Any. Not float64.
template <class S, class F>
__device__ __forceinline__ void as_storage(DType dtype, const F& f) {
  if constexpr (std::is_same_v<S, Any>)
    with_storage(dtype, f);
  else
    f(static_cast<S*>(nullptr));
}

template <class S>
struct Elements {
  S* data;
  __device__ Elements(char* memory, DType, int64_t offset) : data(reinterpret_cast<S*>(memory)) {
    if (data != nullptr) data += offset;
  }
  __device__ float load(int64_t i) const { return widen(data[i]); }
  __device__ void store(int64_t i, float x) const { data[i] = narrow<S>(x); }
};

template <>
struct Elements<Any> {
  DType dtype;
  char* data;
  __device__ Elements(char* memory, DType dtype, int64_t offset) : dtype(dtype), data(memory) {
    if (data != nullptr) data += offset * size_of(dtype);
  }
  __device__ double load(int64_t i) const {
    switch (dtype) {
      case DType::f64:
        return reinterpret_cast<const double*>(data)[i];
      case DType::f32:
        return reinterpret_cast<const float*>(data)[i];
      case DType::f16:
        return widen(reinterpret_cast<const __half*>(data)[i]);
      default:
        return widen(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
    }
  }
  __device__ void store(int64_t i, double x) const {
    switch (dtype) {
      case DType::f64:
        reinterpret_cast<double*>(data)[i] = x;
        return;
      case DType::f32:
        reinterpret_cast<float*>(data)[i] = float(x);
        return;
      case DType::f16:
        reinterpret_cast<__half*>(data)[i] = narrow<__half>(float(x));
        return;
      default:
        reinterpret_cast<__nv_bfloat16*>(data)[i] = narrow<__nv_bfloat16>(float(x));
    }
  }
};

}  // namespace fastkd::cuda
