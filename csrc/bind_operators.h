// The operators as functions of a Python module: the device of a call decides which one runs.
#pragma once

#include <stdexcept>

#include "casters.h"
#include "operators.h"

#ifdef FASTKD_CUDA_ARCHS
#include "cuda/scratch.h"
#define FASTKD_GPU(name) cuda::name
#else
#define FASTKD_GPU(name) nullptr
#endif
#ifdef FASTKD_NO_CPU
#define FASTKD_CPU(name) nullptr
#else
#define FASTKD_CPU(name) cpu::name
#endif

namespace fastkd {

template <class Function>
struct Operator;

template <class... Arguments>
struct Operator<void(const Place&, Arguments...)> {
  using Function = void (*)(const Place&, Arguments...);

  static void bind(pybind11::module_& m, const char* name, Function on_cpu, Function on_gpu) {
    m.def(
        name,
        [=](const Place& place, Arguments... arguments) {
          const Function run = place.is_cpu() ? on_cpu : on_gpu;
          if (run == nullptr) throw std::runtime_error("not compiled for this device");
          run(place, arguments...);
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
  }
};

inline void bind_operators(pybind11::module_& m) {
  bind_parameters<SoftTargetParameters>(m, "SoftTarget");
  bind_parameters<MetricsParameters>(m, "Metrics");
  bind_parameters<MapParameters>(m, "Map");
  bind_parameters<TransferParameters>(m, "Transfer");
  bind_parameters<HintParameters>(m, "Hint");

#define FASTKD_BIND(name) \
  Operator<decltype(cuda::name)>::bind(m, #name, FASTKD_CPU(name), FASTKD_GPU(name))
#define FASTKD_BIND_ON_CPU(name) \
  Operator<decltype(cpu::name)>::bind(m, #name, FASTKD_CPU(name), nullptr)
  FASTKD_BIND(soft_target_forward);
  FASTKD_BIND(soft_target_backward);
  FASTKD_BIND(soft_target_terms);
  FASTKD_BIND(top_k_forward);
  FASTKD_BIND(top_k_sums);
  FASTKD_BIND(distillation_metrics);
  FASTKD_BIND(attention_map_forward);
  FASTKD_BIND(attention_transfer_forward);
  FASTKD_BIND(attention_backward);
  FASTKD_BIND(hint_forward);
  FASTKD_BIND(hint_backward);
  FASTKD_BIND(squared_distances);
  FASTKD_BIND(rkd_distance);
  FASTKD_BIND(rkd_angle);
  FASTKD_BIND(similarity);
  FASTKD_BIND(multiply);
  FASTKD_BIND_ON_CPU(max_pool);
  FASTKD_BIND_ON_CPU(max_pool_backward);
#undef FASTKD_BIND
#undef FASTKD_BIND_ON_CPU

#ifdef FASTKD_CUDA_ARCHS
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("soft_target_scratch_bytes", cuda::soft_target_scratch_bytes);
  m.def("top_k_scratch_bytes", cuda::soft_target_scratch_bytes);
  m.def("attention_scratch_bytes", cuda::attention_scratch_bytes, unlocked());
  m.def("hint_scratch_bytes", cuda::hint_scratch_bytes);
  m.def("hint_rows_scratch_bytes", cuda::hint_rows_scratch_bytes, unlocked());
  m.def("rkd_scratch_bytes", cuda::rkd_scratch_bytes);
  m.def("similarity_scratch_bytes", cuda::similarity_scratch_bytes);
#endif
}

}  // namespace fastkd
