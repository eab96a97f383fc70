// Teachers that kept k classes of each row: all rows of a call.
#include "top_k_row.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class A>
void run_rows(const Arguments<A>& a, const Slots<A>& slots, const Wanted& wanted, int available) {
  const int64_t read = wanted.reads || a.to_student ? a.classes : slots.k;
  const bool is_off = a.weights.soft == 0 && a.weights.hard == 0;
  parallel_for(a.rows.count, threads_for(a.rows.count * read, available), [&](int64_t row) {
    if (a.ignores(row)) {
      a.skip(row);
      if (slots.log_q)
        for (int64_t j = 0; j <= slots.k; ++j) slots.log_q[row * (slots.k + 1) + j] = -INFINITY;
    } else if (a.temperatures) {
      const Arguments<A> of_row = a.of_row(row);
      Row<A>(of_row, slots, wanted, row).run();
    } else {
      Row<A>(a, slots, wanted, row).run();
    }
    // Where both terms are switched off nothing is left of a gradient, NaN neither.
    if (is_off) a.write_zeros(row);
  });
}

void forward(const Tensor& student, const Tensor& indices, const Tensor& log_p,
             const Tensor& log_rest, const Labels& labels, const Tensors& temperatures, void* loss,
             void* parts, const Tensor& log_q, const Tensor& gradient, const Tensor& grad_output,
             bool listed_only, const WholeRows& whole, const SoftTargetParameters& p,
             int available) {
  const Rows rows({&student, gradient ? &gradient : &student, &student}, p.dim);
  const auto with = [&](auto number) {
    using A = decltype(number);
    Arguments<A> a(p, rows, labels, temperatures, gradient, Tensor{}, grad_output);
    const Slots<A> slots{indices.sizes[1],
                         indices.as<int32_t>(),
                         listed_only,
                         whole.first,
                         log_p.as<A>(),
                         log_rest.as<A>(),
                         log_q.as<A>(),
                         whole.sums,
                         static_cast<const A*>(whole.logits)};
    const Wanted wanted(a, slots, parts != nullptr);
    Array<A> losses(loss ? 2 * rows.count : 0);
    if (loss) a.losses = losses.data();
    run_rows(a, slots, wanted, available);
    if (loss) reduce(a, static_cast<A*>(loss), static_cast<A*>(parts), available);
  };
  log_p.dtype == DType::f64 ? with(double()) : with(float());
}

void sum(const Tensor& student, const Tensor& indices, const Labels& labels,
         const Tensors& temperatures, double* sums, bool listed_only, int64_t first,
         const SoftTargetParameters& p, int available) {
  const Rows rows({&student, &student, &student}, p.dim);
  const auto with = [&](auto number) {
    using A = decltype(number);
    const Arguments<A> a(p, rows, labels, temperatures, Tensor{}, Tensor{}, Tensor{});
    // All classes are those of no slots.
    const int64_t k = listed_only ? 0 : indices.sizes[1];
    const Slots<A> slots{k, indices.as<int32_t>(), listed_only, first};
    const Wanted wanted(a, slots, true);
    parallel_for(rows.count, threads_for(rows.count * rows.classes, available), [&](int64_t row) {
      double* const to = sums + row * kSums;
      if (a.ignores(row)) {
        to[kMaximum] = -INFINITY;
        to[kSum] = to[kSumAt1] = to[kLogits] = 0;
      } else {
        const Arguments<A> of_row = a.of_row(row);
        Row<A>(of_row, slots, wanted, row).sum(to);
      }
    });
  };
  student.dtype == DType::f64 ? with(double()) : with(float());
}

}  // namespace

extern const TopKKernels top_k_kernels{forward, sum};

}  // namespace fastkd::FASTKD_ISA
