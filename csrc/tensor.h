// A tensor as the kernels see it: memory, sizes and strides. Nothing here knows of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastkd {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, i32 = 4, i64 = 5, u8 = 6 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 || dtype == DType::i64   ? 8
         : dtype == DType::f32 || dtype == DType::i32 ? 4
         : dtype == DType::u8                         ? 1
                                                      : 2;
}

constexpr int kMaxDims = 64;

struct Tensor {
  char* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  bool non_temporal = false;  // for a gradient: it is written past the cache
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; ++d) count *= sizes[d];
    return count;
  }
  // The memory of a contiguous tensor, or null where there is none.
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  explicit operator bool() const { return data != nullptr; }
};

using Tensors = std::vector<Tensor>;

}  // namespace fastkd
