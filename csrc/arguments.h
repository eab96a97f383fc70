// Arguments that both the CPU's and the GPU's functions take, as objects that Python can keep.
#pragma once

#include <pybind11/pybind11.h>

#include "soft_target.h"

namespace fastkd {

struct SoftTargetArguments : SoftTargetParameters {
  SoftTargetArguments(double temperature, double soft_weight, double hard_weight,
                      double label_smoothing, int64_t ignore_index, int reduction, int dim,
                      int threads)
      : SoftTargetParameters{temperature,  soft_weight,          hard_weight, label_smoothing,
                             ignore_index, Reduction(reduction), dim,         threads} {}
};

inline void bind_arguments(pybind11::module_& m) {
  pybind11::class_<SoftTargetArguments>(m, "SoftTarget")
      .def(pybind11::init<double, double, double, double, int64_t, int, int, int>());
}

}  // namespace fastkd
