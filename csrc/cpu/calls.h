// One call of a loss, over all its pairs: from per-sample results to the loss, and from grad_output
// to the kernels. The reductions run in a fixed order, in double.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastkd::calls {

using Labels = const int64_t*;
using Winners = std::vector<int32_t*>;

void soft_target_forward(const Tensor& student, const Tensor& teacher, Labels labels, void* loss,
                         void* statistics, Tensor gradient, const SoftTargetParameters& p);
void soft_target_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                          Labels labels, const void* statistics, Tensor to_student,
                          Tensor to_teacher, const SoftTargetParameters& p);

void soft_target_ensemble(const Tensor& student, const Tensors& teachers,
                          const std::vector<double>& weights, Labels labels, void* loss,
                          void* parts, Tensor gradient, const Tensor& grad_output,
                          const SoftTargetParameters& p);

void attention_map_forward(const Tensor& features, const Tensor& raw, int32_t* winners,
                           const MapParameters& p);
void attention_transfer_forward(const Tensors& students, const Tensors& teachers,
                                const Tensor& loss, const Tensors& slopes, const Winners& winners,
                                Tensors gradients, const TransferParameters& transfer,
                                const MapParameters& p);
void attention_backward(const Tensor& grad_output, const Tensors& features, const Tensors& slopes,
                        const Winners& winners, Tensors gradients, const MapParameters& p);

struct HintParameters {
  double scale;
  Reduction reduction;
  int threads;
};

void hint_forward(const Tensors& students, const Tensors& teachers, const Tensor& loss,
                  Tensors gradients, const HintParameters& p);
// `gradients` are of students, then teachers; any may be absent.
void hint_backward(const Tensor& grad_output, const Tensors& students, const Tensors& teachers,
                   Tensors gradients, const HintParameters& p);

void squared_distances(const Tensor& x, const Tensor& to, int threads);
void rkd_distance(const Tensor& student, const Tensor& teacher, const Tensor& loss,
                  const Tensor& slopes, double delta, int threads);
void rkd_angle(const Tensor& student, const Tensor& teacher, const Tensor& loss,
               const Tensor& slopes, double delta, int threads);
void similarity(const Tensor& student, const Tensor& teacher, const Tensor& loss,
                const Tensor& slopes, int threads);

void max_pool(const Tensor& features, const Tensor& pooled, int32_t* winners, int threads);
void max_pool_backward(const Tensor& grad_output, const int32_t* winners, Tensor gradient,
                       int threads);

}  // namespace fastkd::calls
