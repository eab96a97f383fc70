#include "calls.h"

#include <stdexcept>

#include "thresholds.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd::calls {
namespace {

int64_t bytes_of(const Tensor& t) { return t ? t.numel() * size_of(t.dtype) : 0; }

// `total` bytes of gradients are about to be written, these among them. Many are written past the
// cache: it would not keep them until they are read, and lines that are written in full need not be
// read first. docs/performance.md has the measurement. A large gradient may lie in pages that
// nobody has touched. As huge pages they come 512 at a time, and in a third of the time.
void expect_writing(Tensor& gradient, int64_t total) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.data);
  // Memory that is not aligned to the dtype never is to a vector.
  gradient.streams =
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
void check_labels(Labels labels, const Tensor& logits, const SoftTargetParameters& p) {
  if (labels == nullptr) return;
  const int64_t classes = logits.sizes[p.dim], rows = logits.numel() / classes;
  for (int64_t row = 0; row < rows; ++row)
    if ((labels[row] < 0 || labels[row] >= classes) && labels[row] != p.ignore_index)
      throw std::invalid_argument("labels must lie in [0, " + std::to_string(classes - 1) +
                                  "] or be ignore_index=" + std::to_string(p.ignore_index) +
                                  ", got " + std::to_string(labels[row]));
}

// Winners are numbered in 32 bits.
void check_channels(const Tensor& features, const MapParameters& p) {
  const int64_t channels = features.sizes[p.channel_dim + (p.channel_dim < 0 ? features.ndim : 0)];
  if (p.kind == MapKind::max_pow && channels > INT32_MAX)
    throw std::invalid_argument("max_pow takes at most 2147483647 channels, got " +
                                std::to_string(channels));
}

void put(const Tensor& loss, int64_t i, double value) {
  if (loss.dtype == DType::f64)
    reinterpret_cast<double*>(loss.data)[i] = value;
  else
    reinterpret_cast<float*>(loss.data)[i] = float(value);
}

double* doubles(const Tensor& t) { return reinterpret_cast<double*>(t.data); }

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

void soft_target_forward(const Tensor& student, const Tensor& teacher, Labels labels, void* loss,
                         void* statistics, Tensor gradient, const SoftTargetParameters& p) {
  check_labels(labels, student, p);
  expect_writing(gradient, bytes_of(gradient));
  kernels().soft_target.forward(student, teacher, labels, loss, statistics, gradient, p);
}

void soft_target_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                          Labels labels, const void* statistics, Tensor to_student,
                          Tensor to_teacher, const SoftTargetParameters& p) {
  check_labels(labels, student, p);
  const int64_t total = bytes_of(to_student) + bytes_of(to_teacher);
  expect_writing(to_student, total);
  expect_writing(to_teacher, total);
  kernels().soft_target.backward(grad_output, student, teacher, labels, statistics, to_student,
                                 to_teacher, p);
}

void soft_target_ensemble(const Tensor& student, const Tensors& teachers,
                          const std::vector<double>& weights, Labels labels, void* loss,
                          void* parts, Tensor gradient, const Tensor& grad_output,
                          const SoftTargetParameters& p) {
  check_labels(labels, student, p);
  expect_writing(gradient, bytes_of(gradient));
  kernels().ensemble.both(student, teachers, weights.data(), labels, loss, parts, gradient,
                          grad_output, p);
}

void attention_map_forward(const Tensor& features, const Tensor& raw, int32_t* winners,
                           const MapParameters& p) {
  check_channels(features, p);
  kernels().attention.map(features, raw, winners, p);
}

void attention_transfer_forward(const Tensors& students, const Tensors& teachers,
                                const Tensor& loss, const Tensors& slopes, const Winners& winners,
                                Tensors gradients, const TransferParameters& transfer,
                                const MapParameters& p) {
  for (const Tensors* side : {&students, &teachers})
    for (const Tensor& features : *side) check_channels(features, p);
  expect_writing(gradients);
  const size_t pairs = students.size();
  const int64_t batch = students[0].sizes[0];
  std::vector<double> losses(size_t(batch), 0);
  double total = 0;
  for (size_t j = 0; j < pairs; ++j) {
    const bool both = slopes.size() > pairs;
    const Tensor gradient = gradients.empty() ? Tensor{} : gradients[j];
    kernels().attention.transfer(students[j], teachers[j], losses.data(), slopes[j], winners[j],
                                 both ? slopes[pairs + j] : Tensor{},
                                 both ? winners[pairs + j] : nullptr, gradient, transfer, p);
    for (int64_t b = 0; b < batch; ++b) {
      total += losses[size_t(b)];
      if (transfer.reduction == Reduction::none)
        put(loss, int64_t(j) * batch + b, losses[size_t(b)]);
    }
  }
  if (transfer.reduction != Reduction::none) put(loss, 0, total * transfer.sample_scale(batch));
}

void attention_backward(const Tensor& grad_output, const Tensors& features, const Tensors& slopes,
                        const Winners& winners, Tensors gradients, const MapParameters& p) {
  expect_writing(gradients);
  // Features are those of the students, and of the teachers after them where they were asked for.
  const size_t pairs = grad_output.ndim == 2 ? size_t(grad_output.sizes[0]) : features.size();
  for (size_t j = 0; j < features.size(); ++j)
    kernels().attention.backward(of_pair(grad_output, j, pairs), features[j], slopes[j], winners[j],
                                 gradients[j], p);
}

void hint_forward(const Tensors& students, const Tensors& teachers, const Tensor& loss,
                  Tensors gradients, const HintParameters& p) {
  expect_writing(gradients);
  // A gradient in its student's place is written where the cache has just read.
  for (size_t j = 0; j < gradients.size(); ++j)
    gradients[j].streams &= gradients[j].data != students[j].data;
  double total = 0;
  for (size_t j = 0; j < students.size(); ++j) {
    const int64_t batch = students[j].sizes[0];
    const double divisor = divisor_of(students[j], p.reduction);
    const Tensor gradient = gradients.empty() ? Tensor{} : gradients[j];
    std::vector<double> losses(size_t(batch), 0);
    kernels().hint.forward(students[j], teachers[j], loss.dtype == DType::f64, losses.data(),
                           p.scale, 2 * p.scale / divisor, gradient, p.threads);
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      sum += losses[size_t(b)];
      if (p.reduction == Reduction::none) put(loss, int64_t(j) * batch + b, losses[size_t(b)]);
    }
    total += sum / divisor;
  }
  if (p.reduction != Reduction::none) put(loss, 0, total);
}

void hint_backward(const Tensor& grad_output, const Tensors& students, const Tensors& teachers,
                   Tensors gradients, const HintParameters& p) {
  expect_writing(gradients);
  const size_t pairs = students.size();
  for (size_t j = 0; j < pairs; ++j) {
    const double coefficient = 2 * p.scale / divisor_of(students[j], p.reduction);
    const Tensor to_teacher = gradients.size() > pairs ? gradients[pairs + j] : Tensor{};
    kernels().hint.backward(of_pair(grad_output, j, pairs), students[j], teachers[j], coefficient,
                            gradients[j], to_teacher, p.threads);
  }
}

void squared_distances(const Tensor& x, const Tensor& to, int threads) {
  kernels().rkd.squares(x, doubles(to), threads);
}

void rkd_distance(const Tensor& student, const Tensor& teacher, const Tensor& loss,
                  const Tensor& slopes, double delta, int threads) {
  const int64_t n = student.sizes[0];
  put(loss, 0,
      n == 0 ? 0
             : kernels().rkd.distance(doubles(student), doubles(teacher), n, doubles(slopes), delta,
                                      threads));
}

void rkd_angle(const Tensor& student, const Tensor& teacher, const Tensor& loss,
               const Tensor& slopes, double delta, int threads) {
  const int64_t n = student.sizes[0];
  put(loss, 0,
      n == 0 ? 0
             : kernels().rkd.angle(doubles(student), doubles(teacher), n, doubles(slopes), delta,
                                   threads));
}

void similarity(const Tensor& student, const Tensor& teacher, const Tensor& loss,
                const Tensor& slopes, int threads) {
  const bool is_empty = student.sizes[0] == 0;
  put(loss, 0, is_empty ? 0 : kernels().similarity.compare(student, teacher, slopes, threads));
}

void max_pool(const Tensor& features, const Tensor& pooled, int32_t* winners, int threads) {
  kernels().fsp.pool(features, pooled, winners, threads);
}

void max_pool_backward(const Tensor& grad_output, const int32_t* winners, Tensor gradient,
                       int threads) {
  expect_writing(gradient, bytes_of(gradient));
  kernels().fsp.unpool(grad_output, winners, gradient, threads);
}

}  // namespace fastkd::calls
