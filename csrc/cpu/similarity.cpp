// Similarities between samples: Gram matrices with rows of norm 1, compared.
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr double kEps = 1e-12;

using vec = vec_t<double>;

template <class A>
double norm_of(const A* row, int64_t n) {
  vec squares = {};
  over_vectors<double>(n, [&](int64_t j, auto lanes) {
    const vec g = load_lanes<double>(row + j, lanes, 0.0);
    squares += g * g;
  });
  return std::sqrt(sum<double>(squares));
}

// The loss, and dL/dG + (dL/dG)ᵀ by the student's matrix if `slopes`.
template <class A>
double compare(const A* student, const A* teacher, int64_t n, A* slopes, int available) {
  const int threads = threads_for(n * n, available);
  const double scale = 1 / (double(n) * double(n));
  Array<double> losses(n);
  parallel_for(n, threads, [&](int64_t i) {
    const A *s = student + i * n, *t = teacher + i * n;
    const double norm = norm_of(s, n), norm_t = norm_of(t, n);
    const double over = norm < kEps ? kEps : norm;
    const double over_t = norm_t < kEps ? kEps : norm_t;
    vec squares = {}, radial = {};
    over_vectors<double>(n, [&](int64_t j, auto lanes) {
      const vec q = load_lanes<double>(s + j, lanes, 0.0) / over;
      const vec e = q - load_lanes<double>(t + j, lanes, 0.0) / over_t;
      squares += e * e;
      radial += q * e;
    });
    losses[i] = sum<double>(squares);
    if (slopes == nullptr) return;
    // A row of zeros stays what it is; one that is divided by kEps has no norm to change.
    const double along = norm < kEps ? 0 : sum<double>(radial);
    const double factor = norm == 0 ? 0 : 2 * scale / over;
    over_vectors<double>(n, [&](int64_t j, auto lanes) {
      const vec q = load_lanes<double>(s + j, lanes, 0.0) / over;
      const vec e = q - load_lanes<double>(t + j, lanes, 0.0) / over_t;
      store_lanes<double>(factor * (e - q * along), slopes + i * n + j, lanes);
    });
  });
  if (slopes != nullptr)
    parallel_for(n, threads, [&](int64_t work) {
      const int64_t i = work % 2 ? n - 1 - work / 2 : work / 2;
      for (int64_t j = 0; j <= i; ++j)
        slopes[i * n + j] = slopes[j * n + i] = slopes[i * n + j] + slopes[j * n + i];
    });
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += losses[i];
  return scale * total;
}

double compare_any(const Tensor& student, const Tensor& teacher, const Tensor& slopes,
                   int threads) {
  const int64_t n = student.sizes[0];
  const auto run = [&](auto* storage) {
    using A = std::remove_pointer_t<decltype(storage)>;
    A* to = slopes ? at<A>(slopes, 0) : nullptr;
    return compare(at<A>(student, 0), at<A>(teacher, 0), n, to, threads);
  };
  return student.dtype == DType::f64 ? run((double*)nullptr) : run((float*)nullptr);
}

}  // namespace

extern const SimilarityKernels similarity_kernels{compare_any};

}  // namespace fastkd::FASTKD_ISA
