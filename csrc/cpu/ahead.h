// What is read next, fetched while something else is written.
#pragma once

#include "memory.h"

namespace fastkd::FASTKD_ISA {

// Two stretches of memory that are read after a loop that mostly writes, fetched in step with it.
// Without that, memory is only read for a while, and then only written.
struct Ahead {
  const char *first = nullptr, *second = nullptr;
  int lines = 1;  // of the first for each of the second

  // The loop has come to `offset`, in bytes of the second.
  void step(int64_t offset) const {
    if (first == nullptr) return;
    fetch(second + offset, kLine);
    fetch(first + offset * lines, lines * kLine);
  }
};

}  // namespace fastkd::FASTKD_ISA
