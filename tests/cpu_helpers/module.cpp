// The helpers as a Python module: memory comes and goes as bytes, values as float64.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "helpers.h"

namespace py = pybind11;

namespace {

using namespace fastkd;

// A copy of some bytes that ends where the allocation does, and begins at a multiple of 64.
class Memory {
 public:
  explicit Memory(const std::string& bytes) : size_(bytes.size()) {
    if (posix_memalign(&data_, 64, size_)) throw std::bad_alloc();
    std::memcpy(data_, bytes.data(), size_);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* at(int64_t offset) { return static_cast<char*>(data_) + offset; }
  py::bytes bytes() const { return py::bytes(static_cast<const char*>(data_), size_); }

 private:
  void* data_ = nullptr;
  size_t size_;
};

const Helpers& helpers_of(const std::string& isa) {
  for (const Helpers* one : {
#ifdef FASTKD_HAS_avx512
           &avx512::helpers, &avx2::helpers,
#endif
           &baseline::helpers})
    if (one->isa == isa) return *one;
  throw std::invalid_argument("no helpers for " + isa);
}

using Values = py::array_t<double, py::array::c_style | py::array::forcecast>;

// What memory and values are after one call; `at` is where in memory its first element is.
py::tuple call(const std::string& isa, Helper helper, bool in_double, int dtype,
               const std::string& bytes, int64_t at, const Values& values, int64_t n,
               int64_t stride, bool non_temporal, double fill) {
  Memory memory(bytes);
  Values after(values.size(), values.data());
  helpers_of(isa).call({helper, in_double, DType(dtype), memory.at(at), after.mutable_data(), n,
                        stride, non_temporal, fill});
  return py::make_tuple(memory.bytes(), after);
}

}  // namespace

PYBIND11_MODULE(_cpu_helpers, m) {
  py::enum_<Helper>(m, "Helper")
      .value("load", Helper::load)
      .value("load_as", Helper::load_as)
      .value("load_part", Helper::load_part)
      .value("load_lanes", Helper::load_lanes)
      .value("gather", Helper::gather)
      .value("store", Helper::store)
      .value("store_part", Helper::store_part)
      .value("store_lanes", Helper::store_lanes)
      .value("stream", Helper::stream)
      .value("write_vectors", Helper::write_vectors)
      .value("scatter", Helper::scatter);
  m.def("call", &call);
  m.def("width",
        [](const std::string& isa, bool in_double) { return helpers_of(isa).width(in_double); });
  m.def("streamed_bytes", [](const std::string& isa, bool in_double, int dtype) {
    return helpers_of(isa).streamed_bytes(in_double, DType(dtype));
  });
  m.def("until_aligned",
        [](const std::string& isa, bool in_double, int dtype, uintptr_t address, int n) {
          return helpers_of(isa).until_aligned(in_double, DType(dtype),
                                               reinterpret_cast<const char*>(address), n);
        });
}
