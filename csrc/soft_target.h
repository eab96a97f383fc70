// Soft targets and hard labels: what the CPU's kernels and the GPU's have in common.
#pragma once

#include <tuple>

#include "divergence.h"
#include "fields.h"
#include "reduction.h"

namespace fastkd {

// What a teacher's numbers are. Probabilities and their logarithms are used as they are: the
// teacher's temperature is 1, and nothing is normalised. A teacher that kept k classes has an
// operator of its own (see top_k.h).
enum class TeacherIs { logits, probabilities, log_probabilities, top_k };
constexpr std::array<const char*, 4> names_of(TeacherIs) {
  return {"logits", "probabilities", "log_probabilities", "top_k"};
}

constexpr int64_t kElsewhere = -2;

struct SoftTargetParameters {
  double temperature;
  double teacher_temperature;
  double soft_weight;
  double hard_weight;
  double label_smoothing;
  int64_t ignore_index;
  bool labels_are_classes;  // or they only tell which rows count
  Divergence divergence;
  double beta;  // of the divergences of mixtures
  Reduction reduction;
  int dim;                      // of the classes, counted from the front
  std::vector<double> weights;  // of the teachers; they sum to 1
  TeacherIs teacher_is;
  // Of a shard of the classes, how many there are in all shards; 0 where the tensors have all. A
  // label is then kElsewhere where another shard has its class.
  int64_t all_classes;
  // Of logits that were capped (see softcap.h), where the gradient is that of what they were
  // before; or 0.
  double softcap, teacher_softcap;

  static constexpr auto fields() {
    using P = SoftTargetParameters;
    return std::make_tuple(
        field("temperature", &P::temperature),
        field("teacher_temperature", &P::teacher_temperature),
        field("soft_weight", &P::soft_weight), field("hard_weight", &P::hard_weight),
        field("label_smoothing", &P::label_smoothing), field("ignore_index", &P::ignore_index),
        field("labels_are_classes", &P::labels_are_classes), field("divergence", &P::divergence),
        field("beta", &P::beta), field("reduction", &P::reduction), field("dim", &P::dim),
        field("weights", &P::weights), field("teacher_is", &P::teacher_is),
        field("all_classes", &P::all_classes), field("softcap", &P::softcap),
        field("teacher_softcap", &P::teacher_softcap));
  }
};

// Statistics of one row, as many of the accumulation type (see fastkd/ops/soft_target.py). Where
// the losses of rows are reduced, the number of rows that count comes after the last row. The
// divergence and the cross-entropy of a row are scaled as its logits are.
enum Statistic { kStudentMax, kStudentSum, kTeacherMax, kTeacherSum, kHardSum, kKl, kCe, kCount };

// A weight of 0 switches its term off, also where the term is infinite or NaN.
constexpr double weighted(double weight, double term) { return weight == 0 ? 0 : weight * term; }

}  // namespace fastkd
