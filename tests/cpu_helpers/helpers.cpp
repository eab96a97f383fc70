// The helpers of one instruction set, by name; compiled once for each.
#include "helpers.h"

#include <stdexcept>

#include "memory.h"
#include "parallel.h"

#define FASTKD_TEXT(x) #x
#define FASTKD_NAME(x) FASTKD_TEXT(x)

namespace fastkd::FASTKD_ISA {
namespace {

// f(null pointers of the arithmetic and of the storage type)
template <class F>
auto with_types(bool in_double, DType dtype, const F& f) {
  return with_storage(dtype, [&](auto* storage) {
    return in_double ? f((double*)nullptr, storage) : f((float*)nullptr, storage);
  });
}

template <class A>
vec_t<A> vector_of(const double* values) {
  vec_t<A> v;
  for (int i = 0; i < Simd<A>::width; ++i) v[i] = A(values[i]);
  return v;
}

template <class A>
std::vector<A> array_of(const double* values, int64_t n) {
  return std::vector<A>(values, values + n);
}

template <class A, class S>
vec_t<A> loaded(const Call& call, const S* from) {
  const int n = int(call.n);
  const A fill = A(call.fill);
  switch (call.helper) {
    case Helper::load:
      if constexpr (sizeof(S) == 2 || sizeof(S) == sizeof(A)) return load<A>(from);
      throw std::invalid_argument("load takes halves and the arithmetic's own type");
    case Helper::load_as:
      return load_as<A>(from);
    case Helper::load_part:
      return load_part<A>(from, n, fill);
    default:
      return n == Simd<A>::width ? load_lanes<A>(from, All<A>{}, fill)
                                 : load_lanes<A>(from, n, fill);
  }
}

template <class A, class S>
void write(const Call& call, S* to) {
  const int n = int(call.n);
  switch (call.helper) {
    case Helper::store:
      return store(vector_of<A>(call.values), to);
    case Helper::store_part:
      return store_part(vector_of<A>(call.values), to, n);
    case Helper::stream:
      return stream(vector_of<A>(call.values), to);
    case Helper::write_vectors: {
      auto values = array_of<A>(call.values, call.n);
      return write_vectors<A>(to, call.n, call.non_temporal, [&](int64_t i, auto lanes) {
        return load_lanes<A>(values.data() + i, lanes, A(0));
      });
    }
    default:
      if (n == Simd<A>::width)
        store_lanes<A>(vector_of<A>(call.values), to, All<A>{});
      else
        store_lanes<A>(vector_of<A>(call.values), to, n);
  }
}

void call_helper(const Call& call) {
  with_types(call.in_double, call.dtype, [&](auto* arithmetic, auto* storage) {
    using A = std::remove_pointer_t<decltype(arithmetic)>;
    using S = std::remove_pointer_t<decltype(storage)>;
    Tensor tensor;
    tensor.data = call.memory;
    tensor.dtype = call.dtype;
    tensor.non_temporal = call.non_temporal;
    S* memory = at<S>(tensor, 0);
    if (call.helper == Helper::gather) {
      std::vector<A> to(size_t(call.n));
      gather(tensor, 0, call.stride, call.n, to.data());
      for (int64_t i = 0; i < call.n; ++i) call.values[i] = double(to[size_t(i)]);
    } else if (call.helper == Helper::scatter) {
      const auto from = array_of<A>(call.values, call.n);
      scatter(from.data(), call.n, tensor, 0, call.stride);
    } else if (call.helper < Helper::gather) {
      const auto v = loaded<A, S>(call, memory);
      for (int i = 0; i < Simd<A>::width; ++i) call.values[i] = double(v[i]);
    } else {
      write<A>(call, memory);
    }
    finish_streaming();
  });
}

int width_of(bool in_double) { return in_double ? Simd<double>::width : Simd<float>::width; }

int streamed_bytes_of(bool in_double, DType dtype) {
  return with_types(in_double, dtype, [](auto* arithmetic, auto* storage) {
    return streamed_bytes<std::remove_pointer_t<decltype(arithmetic)>,
                          std::remove_pointer_t<decltype(storage)>>();
  });
}

int until_aligned_of(bool in_double, DType dtype, const char* to, int n) {
  return with_types(in_double, dtype, [&](auto* arithmetic, auto* storage) {
    return until_aligned<std::remove_pointer_t<decltype(arithmetic)>>(
        reinterpret_cast<decltype(storage)>(const_cast<char*>(to)), n);
  });
}

}  // namespace

extern const Helpers helpers{FASTKD_NAME(FASTKD_ISA), width_of, call_helper, streamed_bytes_of,
                             until_aligned_of};

}  // namespace fastkd::FASTKD_ISA
