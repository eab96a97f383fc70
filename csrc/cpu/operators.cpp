// The operators on the CPU, over all pairs of a call: from the results of samples to the loss, and
// from grad_output to the kernels. The reductions run in a fixed order, in double.
#include "../operators.h"

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "thresholds.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd::cpu {
namespace {

int64_t bytes_of(const Tensor& t) { return t ? t.numel() * size_of(t.dtype) : 0; }

// `total` bytes of gradients are about to be written, these among them. Many are written past the
// cache: it would not keep them until they are read, and lines that are written in full need not be
// read first. docs/performance.md has the measurement. A large gradient may lie in pages that
// nobody has touched. As huge pages they come 512 at a time, and in a third of the time.
void expect_writing(Tensor& gradient, int64_t total) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.data);
  // Memory that is not aligned to the dtype never is to a vector.
  gradient.non_temporal =
      total >= thresholds.past_cache && begin % uintptr_t(size_of(gradient.dtype)) == 0;
#if defined(__linux__)
  const uintptr_t huge = uintptr_t(thresholds.huge_page);
  const uintptr_t end = begin + uintptr_t(bytes_of(gradient));
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (begin != 0 && first < last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void expect_writing(Tensors& gradients) {
  int64_t total = 0;
  for (const Tensor& gradient : gradients) total += bytes_of(gradient);
  for (Tensor& gradient : gradients) expect_writing(gradient, total);
}

// Memory is only touched after this: a label out of range must not become an address.
Labels check_labels(const Tensor& tensor, const Tensor& logits, const Place& place,
                    const SoftTargetParameters& p) {
  const int64_t* const labels = tensor.as<int64_t>();
  const int64_t classes = logits.sizes[p.dim], rows = logits.numel() / classes;
  if (labels == nullptr) return {labels, rows};
  [[maybe_unused]] const int threads = rows < thresholds.per_thread ? 1 : place.threads();
  int64_t kept = 0, wrong = rows;  // the first one that is
#ifdef FASTKD_OPENMP
#pragma omp parallel for num_threads(threads) reduction(+ : kept) reduction(min : wrong)
#endif
  for (int64_t row = 0; row < rows; ++row) {
    const bool is_kept = labels[row] != p.ignore_index;
    kept += is_kept;
    const bool is_class = uint64_t(labels[row]) < uint64_t(classes) ||
                          (p.all_classes != 0 && labels[row] == kElsewhere);
    if (is_kept && !is_class && row < wrong) wrong = row;
  }
  if (wrong < rows)
    throw std::invalid_argument("labels must lie in [0, " + std::to_string(classes - 1) +
                                "] or be ignore_index=" + std::to_string(p.ignore_index) +
                                ", got " + std::to_string(labels[wrong]));
  return {labels, kept};
}

// Argmax are numbered in 32 bits.
void check_channels(const Tensor& features, const MapParameters& p) {
  const int64_t channels = features.sizes[p.channel_dim + (p.channel_dim < 0 ? features.ndim : 0)];
  if (p.kind == MapKind::max_pow && channels > INT32_MAX)
    throw std::invalid_argument("max_pow takes at most 2147483647 channels, got " +
                                std::to_string(channels));
}

void put(const Tensor& loss, int64_t i, double value) {
  if (loss.dtype == DType::f64)
    loss.as<double>()[i] = value;
  else
    loss.as<float>()[i] = float(value);
}

template <class A>
void scale(A* x, A by, const Tensor& gradient, const Place& place) {
  const int64_t count = gradient.numel();
  [[maybe_unused]] const int threads = count < thresholds.per_thread ? 1 : place.threads();
#ifdef FASTKD_OPENMP
#pragma omp parallel for simd num_threads(threads)
#endif
  for (int64_t i = 0; i < count; ++i) x[i] *= by;
}

// grad_output of one pair: the scalar, or the pair's row of (pairs, batch).
Tensor of_pair(const Tensor& grad_output, size_t pair, size_t pairs) {
  Tensor row = grad_output;
  if (grad_output.ndim == 2) {
    row.ndim = 1;
    row.sizes[0] = grad_output.sizes[1];
    row.data += int64_t(pair % pairs) * row.sizes[0] * size_of(row.dtype);
  }
  return row;
}

}  // namespace

void soft_target_forward(const Place& place, const Tensor& student, const Tensors& teachers,
                         const Tensor& labels, const Tensor& loss, const Tensor& parts,
                         const Tensor& statistics, const Tensor& gradient, const Tensor&,
                         const SoftTargetParameters& p, const Tensors& temperatures,
                         const Tensor& grad_output) {
  const Labels checked = check_labels(labels, student, place, p);
  Tensor to = gradient;
  expect_writing(to, bytes_of(to));
  kernels().soft_target.forward(student, teachers, checked, temperatures, loss.data, parts.data,
                                statistics.data, to, grad_output, p, place.threads());
}

void soft_target_backward(const Place& place, const Tensor& grad_output, const Tensor& student,
                          const Tensors& teachers, const Tensor& labels, const Tensor& statistics,
                          const Tensor& to_student, const Tensor& to_teacher, const Tensor&,
                          const SoftTargetParameters& p, const Tensor&, const Tensors& temperatures,
                          const Tensor& to_temperatures) {
  const Labels checked = check_labels(labels, student, place, p);
  Tensors to{to_student, to_teacher};
  expect_writing(to);
  kernels().soft_target.backward(grad_output, student, teachers, checked, temperatures,
                                 statistics.data, to[0], to[1], to_temperatures, p,
                                 place.threads());
}

void soft_target_terms(const Place& place, const Tensor& student, const Tensors& teachers,
                       const Tensor& labels, const Tensor& statistics, const Tensor& terms,
                       const SoftTargetParameters& p, const Tensors& temperatures) {
  const Labels checked = check_labels(labels, student, place, p);
  kernels().soft_target.terms(student, teachers, checked, temperatures, statistics.data,
                              terms.as<double>(), p, place.threads());
}

void top_k_forward(const Place& place, const Tensor& student, const Tensor& indices,
                   const Tensor& log_p, const Tensor& log_rest, const Tensor& labels,
                   const Tensor& loss, const Tensor& parts, const Tensor& log_q,
                   const Tensor& gradient, const Tensor&, bool listed_only, int64_t first,
                   const Tensor& sums, const Tensor& logits, const SoftTargetParameters& p,
                   const Tensors& temperatures, const Tensor& grad_output) {
  const Labels checked = check_labels(labels, student, place, p);
  Tensor to = gradient;
  expect_writing(to, bytes_of(to));
  kernels().top_k.forward(student, indices, log_p, log_rest, checked, temperatures, loss.data,
                          parts.data, log_q, to, grad_output, listed_only,
                          {first, sums.as<double>(), logits.data}, p, place.threads());
}

void top_k_sums(const Place& place, const Tensor& student, const Tensor& indices,
                const Tensor& labels, const Tensor& sums, const Tensor&, bool listed_only,
                int64_t first, const SoftTargetParameters& p, const Tensors& temperatures) {
  const Labels checked = check_labels(labels, student, place, p);
  kernels().top_k.sum(student, indices, checked, temperatures, sums.as<double>(), listed_only,
                      first, p, place.threads());
}

void distillation_metrics(const Place& place, const Tensor& student, const Tensor& teacher,
                          const Tensor& mask, const Tensor& values, const Tensor& argmax,
                          const MetricsParameters& p) {
  kernels().metrics.measure(student, teacher, mask, values, argmax, p, place.threads());
}

void attention_map_forward(const Place& place, const Tensor& features, const Tensor& raw,
                           const Tensor& argmax, const MapParameters& p) {
  check_channels(features, p);
  kernels().attention.map(features, raw, argmax.as<int32_t>(), p, place.threads());
}

void attention_transfer_forward(const Place& place, const Tensors& students,
                                const Tensors& teachers, const Tensor& loss, const Tensors& slopes,
                                const Tensors& argmax, const Tensors& gradients, const Tensor&,
                                const TransferParameters& transfer, const MapParameters& p) {
  for (const Tensors* side : {&students, &teachers})
    for (const Tensor& features : *side) check_channels(features, p);
  Tensors to = gradients;
  expect_writing(to);
  const size_t pairs = students.size();
  const int64_t batch = students[0].sizes[0];
  std::vector<double> losses(size_t(batch), 0);
  double total = 0;
  for (size_t j = 0; j < pairs; ++j) {
    const bool both = slopes.size() > pairs;
    kernels().attention.transfer(students[j], teachers[j], losses.data(), slopes[j],
                                 argmax_of(argmax, j), both ? slopes[pairs + j] : Tensor{},
                                 both ? argmax_of(argmax, pairs + j) : nullptr,
                                 to.empty() ? Tensor{} : to[j], transfer, p, place.threads());
    for (int64_t b = 0; b < batch; ++b) {
      total += losses[size_t(b)];
      if (transfer.reduction == Reduction::none)
        put(loss, int64_t(j) * batch + b, losses[size_t(b)]);
    }
  }
  if (transfer.reduction != Reduction::none) put(loss, 0, total * transfer.sample_scale(batch));
}

void attention_backward(const Place& place, const Tensor& grad_output, const Tensors& features,
                        const Tensors& slopes, const Tensors& argmax, const Tensors& gradients,
                        const MapParameters& p) {
  Tensors to = gradients;
  expect_writing(to);
  // Features are those of the students, and of the teachers after them where they were asked for.
  const size_t pairs = grad_output.ndim == 2 ? size_t(grad_output.sizes[0]) : features.size();
  for (size_t j = 0; j < features.size(); ++j)
    kernels().attention.backward(of_pair(grad_output, j, pairs), features[j], slopes[j],
                                 argmax_of(argmax, j), to[j], p, place.threads());
}

void hint_forward(const Place& place, const Tensors& students, const Tensors& teachers,
                  const Tensor& loss, const Tensors& gradients, const Tensor&,
                  const HintParameters& p) {
  Tensors to = gradients;
  expect_writing(to);
  // A gradient in its student's place is written where the cache has just read.
  for (size_t j = 0; j < to.size(); ++j) to[j].non_temporal &= to[j].data != students[j].data;
  double total = 0;
  for (size_t j = 0; j < students.size(); ++j) {
    const int64_t batch = students[j].sizes[0];
    const double divisor = divisor_of(students[j], p.reduction);
    std::vector<double> losses(size_t(batch), 0);
    kernels().hint.forward(students[j], teachers[j], loss.dtype == DType::f64, losses.data(),
                           p.scale, 2 * p.scale / divisor, to.empty() ? Tensor{} : to[j],
                           place.threads());
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      sum += losses[size_t(b)];
      if (p.reduction == Reduction::none) put(loss, int64_t(j) * batch + b, losses[size_t(b)]);
    }
    total += sum / divisor;
  }
  if (p.reduction != Reduction::none) put(loss, 0, total);
}

void hint_backward(const Place& place, const Tensor& grad_output, const Tensors& students,
                   const Tensors& teachers, const Tensors& gradients, const HintParameters& p,
                   bool) {
  Tensors to = gradients;
  expect_writing(to);
  const size_t pairs = students.size();
  for (size_t j = 0; j < pairs; ++j) {
    const double coefficient = 2 * p.scale / divisor_of(students[j], p.reduction);
    kernels().hint.backward(of_pair(grad_output, j, pairs), students[j], teachers[j], coefficient,
                            to[j], to.size() > pairs ? to[pairs + j] : Tensor{}, place.threads());
  }
}

void squared_distances(const Place& place, const Tensor& x, const Tensor& to) {
  kernels().rkd.squares(x, to.as<double>(), place.threads());
}

void rkd_distance(const Place& place, const Tensor& student, const Tensor& teacher,
                  const Tensor& loss, const Tensor& slopes, const Tensor&, double delta) {
  const int64_t n = student.sizes[0];
  put(loss, 0,
      n == 0 ? 0
             : kernels().rkd.distance(student.as<double>(), teacher.as<double>(), n,
                                      slopes.as<double>(), delta, place.threads()));
}

void rkd_angle(const Place& place, const Tensor& student, const Tensor& teacher, const Tensor& loss,
               const Tensor& slopes, const Tensor&, double delta) {
  const int64_t n = student.sizes[0];
  put(loss, 0,
      n == 0 ? 0
             : kernels().rkd.angle(student.as<double>(), teacher.as<double>(), n,
                                   slopes.as<double>(), delta, place.threads()));
}

void similarity(const Place& place, const Tensor& student, const Tensor& teacher,
                const Tensor& loss, const Tensor& slopes, const Tensor&) {
  const bool is_empty = student.sizes[0] == 0;
  put(loss, 0,
      is_empty ? 0 : kernels().similarity.compare(student, teacher, slopes, place.threads()));
}

void max_pool(const Place& place, const Tensor& features, const Tensor& pooled,
              const Tensor& argmax) {
  kernels().fsp.pool(features, pooled, argmax.as<int32_t>(), place.threads());
}

void max_pool_backward(const Place& place, const Tensor& grad_output, const Tensor& argmax,
                       const Tensor& gradient) {
  Tensor to = gradient;
  expect_writing(to, bytes_of(to));
  kernels().fsp.unpool(grad_output, argmax.as<int32_t>(), to, place.threads());
}

void multiply(const Place& place, const Tensors& gradients, const Tensor& grad_output) {
  for (const Tensor& gradient : gradients) {
    if (gradient.dtype == DType::f64)  // so was the loss
      scale(gradient.as<double>(), *grad_output.as<double>(), gradient, place);
    else
      scale(gradient.as<float>(),
            grad_output.dtype == DType::f64 ? float(*grad_output.as<double>())
                                            : *grad_output.as<float>(),
            gradient, place);
  }
}

}  // namespace fastkd::cpu
