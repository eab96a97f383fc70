// A call whose teacher kept k classes of each row, from the tensors that its operators are called
// with.
#pragma once

#include "soft_target_plan.h"
#include "top_k.h"

namespace fastkd::cuda::logits {

// Says what both operators know of a call. Whether its rows are contiguous, and not its classes, is
// what it returns.
inline bool describe(TopKCall& of, const fastkd::Tensor& student, const fastkd::Tensor& indices,
                     const fastkd::Tensor& labels, const fastkd::Tensor& gradient, bool listed_only,
                     int64_t first, const SoftTargetParameters& p, const Tensors& temperatures) {
  const Tensors nobody;
  const bool has_temperatures = !temperatures.empty();
  const Plan plan(of.call, nullptr, student, nobody, labels, gradient, {}, p, has_temperatures);
  of.count = indices.sizes[1];
  of.indices = indices.as<int32_t>();
  of.first = first;
  of.all_classes = p.all_classes != 0 ? p.all_classes : of.call.classes;
  of.call.share = 1 / double(of.all_classes);
  of.listed_only = listed_only;
  of.has_classes = of.call.labels != nullptr && p.labels_are_classes;
  if (has_temperatures) {
    of.temperatures = temperatures[0].data;
    of.roots = temperatures[2].data;
  }
  return plan.are_columns;
}

// f(a number of the arithmetic, whether a thread has a row). Columns know no float64.
template <class F>
void with_form(const Call& call, bool are_columns, const F& f) {
  if (call.is_double) return f(double{}, std::false_type{});
  are_columns ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
}

}  // namespace fastkd::cuda::logits
