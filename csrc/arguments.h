// Arguments that both the CPU's and the GPU's functions take, as objects that Python can keep.
#pragma once

#include <pybind11/pybind11.h>

#include "attention.h"
#include "soft_target.h"

namespace fastkd {

struct SoftTargetArguments : SoftTargetParameters {
  SoftTargetArguments(double temperature, double soft_weight, double hard_weight,
                      double label_smoothing, int64_t ignore_index, int reduction, int dim,
                      int threads)
      : SoftTargetParameters{temperature,  soft_weight,          hard_weight, label_smoothing,
                             ignore_index, Reduction(reduction), dim,         threads} {}
};

struct MapArguments : MapParameters {
  MapArguments(int kind, double p, double eps, int channel_dim, int threads)
      : MapParameters{MapKind(kind), p, eps, channel_dim, threads} {}
};

struct TransferArguments : TransferParameters {
  TransferArguments(int distance, double order, double beta, int reduction)
      : TransferParameters{Distance(distance), order, beta, Reduction(reduction)} {}
};

// Buffers that come as their addresses; 0 where there is none.
inline std::vector<int32_t*> winners_at(const std::vector<uintptr_t>& addresses) {
  std::vector<int32_t*> winners;
  for (uintptr_t address : addresses) winners.push_back(reinterpret_cast<int32_t*>(address));
  return winners;
}

inline void bind_arguments(pybind11::module_& m) {
  pybind11::class_<SoftTargetArguments>(m, "SoftTarget")
      .def(pybind11::init<double, double, double, double, int64_t, int, int, int>());
  pybind11::class_<MapArguments>(m, "Map").def(pybind11::init<int, double, double, int, int>());
  pybind11::class_<TransferArguments>(m, "Transfer")
      .def(pybind11::init<int, double, double, int>());
}

}  // namespace fastkd
