// Which instruction set's kernels run: decided once, by asking the processor.
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace fastkd {
namespace {

#define FASTKD_SET(isa)                                                                          \
  Kernels {                                                                                      \
    #isa, isa::soft_target_kernels, isa::attention_kernels, isa::hint_kernels, isa::rkd_kernels, \
        isa::similarity_kernels, isa::fsp_kernels, isa::metrics_kernels, isa::top_k_kernels      \
  }

bool runs_here(const char* isa) {
#if defined(FASTKD_HAS_avx512)
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  return !std::strcmp(isa, "baseline");
}

const Kernels* find(const char* isa) {
  static const Kernels sets[] = {
#if defined(FASTKD_HAS_avx512)
      FASTKD_SET(avx512),
      FASTKD_SET(avx2),
#endif
      FASTKD_SET(baseline),
  };
  for (const Kernels& set : sets)
    if ((isa == nullptr || !std::strcmp(isa, set.isa)) && runs_here(set.isa)) return &set;
  return nullptr;
}

const Kernels*& current() {
  static const Kernels* set = find(nullptr);
  return set;
}

}  // namespace

const Kernels& kernels() { return *current(); }

int available(const char** names) {
  int count = 0;
  for (const char* isa : {"avx512", "avx2", "baseline"})
    if (find(isa) != nullptr) names[count++] = isa;
  return count;
}

bool use(const char* isa) {
  const Kernels* set = find(isa);
  if (set != nullptr) current() = set;
  return set != nullptr;
}

}  // namespace fastkd
