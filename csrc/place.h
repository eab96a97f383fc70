// Where a call runs.
#pragma once

#include <cstdint>

namespace fastkd {

struct Place {
  int device;        // a GPU's index; negative on the CPU
  uintptr_t handle;  // a stream of it, as the runtime's handle; on the CPU the number of threads

  bool is_cpu() const { return device < 0; }
  int threads() const { return int(handle); }
};

}  // namespace fastkd
