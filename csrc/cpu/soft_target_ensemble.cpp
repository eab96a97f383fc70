// Soft targets from several teachers, with and without hard labels.
#include "soft_target_ensemble_columns.h"
#include "soft_target_ensemble_row.h"

namespace fastkd::FASTKD_ISA {
namespace {

// How many rows lie side by side in every tensor; 0 where they do not, or classes are too many.
int64_t columns_of(const Ensemble& of) {
  const int64_t side = of.student.rows.columns();
  bool all =
      of.student.rows.classes <= thresholds.column_classes && of.gradient.rows.columns() == side;
  for (const Side& teacher : of.teachers) all = all && teacher.rows.columns() == side;
  return all ? side : 0;
}

// The table has the rows' statistics and then the parts. Without a loss it is the gradient alone
// that is wanted, for `grad_output`.
template <class A>
void ensemble(const Ensemble& of, const int64_t* labels, A* loss, A* parts,
              const Tensor& grad_output, const SoftTargetParameters& p) {
  const Rows<1>& rows = of.student.rows;
  const Plan<A> plan(rows.count, rows.classes, labels, p);
  const A* factors = grad_output ? at<A>(grad_output, 0) : nullptr;
  const bool by_row = p.reduction == Reduction::none;
  const int64_t elements = rows.count * rows.classes * int64_t(of.teachers.size() + 1);
  const int threads = threads_for(elements, p.threads);
  Array<A> table(rows.count * kCount + kParts);
  const int64_t side = by_row && factors ? 0 : columns_of(of);
  if (side) {
    const double factor = factors ? double(factors[0]) : 1;
    ensemble_columns(of, plan.times(factor), side, labels, table.data(), threads);
  }
  parallel_for(side ? 0 : rows.count, threads, [&](int64_t row) {
    A* statistics = table.data() + row * kCount;
    if (plan.ignores(labels, row)) {
      for (int i = 0; i < kCount; ++i) statistics[i] = 0;
      if (of.writes)
        zero_row<A>(*of.gradient.tensor, of.gradient.offset(row), of.gradient.stride(),
                    rows.classes);
      return;
    }
    const double factor = factors == nullptr ? 1 : double(factors[by_row ? row : 0]);
    ensemble_row(of, plan.times(factor), row, plan.hard ? labels[row] : 0, loss != nullptr,
                 statistics);
  });
  if (of.writes) zero_if_off(plan, of.gradient.rows, of.gradient.tensor, 0);
  if (loss == nullptr) return;
  reduce(table.data(), rows.count, plan, p, loss);
  for (int i = 0; parts != nullptr && i < kParts; ++i) parts[i] = table[rows.count * kCount + i];
}

void ensemble_any(const Tensor& student, const fastkd::Tensors& teachers, const double* weights,
                  const int64_t* labels, void* loss, void* parts, const Tensor& gradient,
                  const Tensor& grad_output, const SoftTargetParameters& p) {
  Ensemble of{Side(student, p.dim),
              Side(gradient ? gradient : student, p.dim),
              bool(gradient),
              {},
              {weights, weights + teachers.size()}};
  bool in_double = student.dtype == DType::f64;
  for (const Tensor& teacher : teachers) {
    of.teachers.emplace_back(teacher, p.dim);
    in_double |= teacher.dtype == DType::f64;
  }
  if (in_double)
    ensemble(of, labels, static_cast<double*>(loss), static_cast<double*>(parts), grad_output, p);
  else
    ensemble(of, labels, static_cast<float*>(loss), static_cast<float*>(parts), grad_output, p);
}

}  // namespace

extern const EnsembleKernels ensemble_kernels{ensemble_any};

}  // namespace fastkd::FASTKD_ISA
