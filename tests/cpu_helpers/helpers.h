// One call of a helper of csrc/cpu/storage.h or memory.h: values of the arithmetic type on one
// side, memory that holds the storage type on the other.
#pragma once

#include "../../csrc/tensor.h"

namespace fastkd {

enum class Helper : int {
  load,
  load_as,
  load_part,
  load_lanes,
  gather,
  store,
  store_part,
  store_lanes,
  stream,
  write_vectors,
  scatter
};

struct Call {
  Helper helper;
  bool in_double;  // the arithmetic
  DType dtype;     // of what is in memory
  char* memory;
  double* values;  // as many as a vector has, or `n` where the helper takes any number
  int64_t n, stride;
  bool non_temporal;
  double fill;
};

struct Helpers {
  const char* isa;
  int (*width)(bool in_double);
  void (*call)(const Call& call);
  int (*streamed_bytes)(bool in_double, DType dtype);
  int (*until_aligned)(bool in_double, DType dtype, const char* to, int n);
};

namespace baseline {
extern const Helpers helpers;
}
namespace avx2 {
extern const Helpers helpers;
}
namespace avx512 {
extern const Helpers helpers;
}

}  // namespace fastkd
