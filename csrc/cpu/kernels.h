// What the CPU kernels offer, the same for every instruction set.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "../metrics.h"
#include "../soft_target.h"

namespace fastkd {

// The labels of rows, which may be absent, and how many rows are not ignored.
struct Labels {
  const int64_t* labels;
  int64_t kept;
};

struct SoftTargetKernels {
  // loss is a scalar, or one per row; its parts, the statistics of the rows of one teacher, and the
  // gradient may be absent. grad_output is a scalar, or one per row; absent for 1.
  void (*forward)(const Tensor& student, const Tensors& teachers, const Labels& labels,
                  const Tensors& temperatures, void* loss, void* parts, void* statistics,
                  const Tensor& gradient, const Tensor& grad_output, const SoftTargetParameters& p,
                  int threads);
  // Either gradient may be absent. Of several teachers, and of a divergence of probabilities, the
  // teacher's and the statistics are, and the gradients of the three temperatures of each row.
  // grad_output is a scalar, or one per row. A shard of the classes has the statistics of all.
  void (*backward)(const Tensor& grad_output, const Tensor& student, const Tensors& teachers,
                   const Labels& labels, const Tensors& temperatures, const void* statistics,
                   const Tensor& to_student, const Tensor& to_teacher,
                   const Tensor& to_temperatures, const SoftTargetParameters& p, int threads);
  // Of one teacher and a divergence of probabilities: (Σφ, Σψ) of each row, from its statistics.
  void (*terms)(const Tensor& student, const Tensors& teachers, const Labels& labels,
                const Tensors& temperatures, const void* statistics, double* to,
                const SoftTargetParameters& p, int threads);
};

struct AttentionKernels {
  // The unnormalised map (B, positions), and the argmax over channels of max_pow.
  void (*map)(const Tensor& features, const Tensor& raw, int32_t* argmax, const MapParameters& p,
              int threads);
  // losses: one per sample. Slopes of the teacher and the gradient may be absent. Those of max_pow
  // are by the features at the argmax.
  void (*transfer)(const Tensor& student, const Tensor& teacher, double* losses,
                   const Tensor& student_slopes, int32_t* student_argmax,
                   const Tensor& teacher_slopes, int32_t* teacher_argmax, const Tensor& gradient,
                   const TransferParameters& transfer, const MapParameters& p, int threads);
  // grad_output is a scalar, or one per sample. With an argmax the features are not read.
  void (*backward)(const Tensor& grad_output, const Tensor& features, const Tensor& slopes,
                   const int32_t* argmax, const Tensor& gradient, const MapParameters& p,
                   int threads);
};

struct HintKernels {
  // losses: scale * sum of squares, one per sample. gradient (of coefficient * difference) may be
  // absent. in_double is the arithmetic of the whole call, whatever this pair's dtypes.
  void (*forward)(const Tensor& student, const Tensor& teacher, bool in_double, double* losses,
                  double scale, double coefficient, const Tensor& gradient, int threads);
  // Either gradient may be absent. grad_output is a scalar, or one per sample; its dtype is the
  // arithmetic's.
  void (*backward)(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                   double coefficient, const Tensor& to_student, const Tensor& to_teacher,
                   int threads);
};

// Matrices are contiguous; those of squared distances n x n, in double. Slopes, the derivatives of
// the loss by the student's in either order together, may be absent. The loss is returned.
struct RkdKernels {
  void (*squares)(const Tensor& x, double* to, int threads);
  double (*distance)(const double* student, const double* teacher, int64_t n, double* slopes,
                     double delta, int threads);
  double (*angle)(const double* student, const double* teacher, int64_t n, double* slopes,
                  double delta, int threads);
};

// The same of Gram matrices of one dtype, the slopes' too.
struct SimilarityKernels {
  double (*compare)(const Tensor& student, const Tensor& teacher, const Tensor& slopes,
                    int threads);
};

// The maxima, contiguous, of bins of a layer's positions; and where in their plane they were, which
// may be absent.
struct FspKernels {
  void (*pool)(const Tensor& features, const Tensor& pooled, int32_t* argmax, int threads);
  void (*unpool)(const Tensor& grad_output, const int32_t* argmax, const Tensor& gradient,
                 int threads);
};

// The values of rows, each of all rows after another, and the arg-maxima of both sides. The mask,
// one byte a row, may be absent.
struct MetricsKernels {
  void (*measure)(const Tensor& student, const Tensor& teacher, const Tensor& mask,
                  const Tensor& values, const Tensor& argmax, const MetricsParameters& p,
                  int threads);
};

// Of rows whose classes are split over shards, what whole rows have; absent where they are not.
struct WholeRows {
  int64_t first;  // class of the shard
  const double* sums;
  const void* logits;  // in the loss's dtype
};

// Teachers that kept k classes: see ../operators.inc. All outputs of `forward` may be absent.
struct TopKKernels {
  void (*forward)(const Tensor& student, const Tensor& indices, const Tensor& log_p,
                  const Tensor& log_rest, const Labels& labels, const Tensors& temperatures,
                  void* loss, void* parts, const Tensor& log_q, const Tensor& gradient,
                  const Tensor& grad_output, bool listed_only, const WholeRows& whole,
                  const SoftTargetParameters& p, int threads);
  // The arithmetic is that of the student's dtype.
  void (*sum)(const Tensor& student, const Tensor& indices, const Labels& labels,
              const Tensors& temperatures, double* sums, bool listed_only, int64_t first,
              const SoftTargetParameters& p, int threads);
};

struct Kernels {
  const char* isa;
  SoftTargetKernels soft_target;
  AttentionKernels attention;
  HintKernels hint;
  RkdKernels rkd;
  SimilarityKernels similarity;
  FspKernels fsp;
  MetricsKernels metrics;
  TopKKernels top_k;
};

// The kernels of each instruction set, defined by its object files.
#define FASTKD_DECLARE(isa)                           \
  namespace isa {                                     \
  extern const SoftTargetKernels soft_target_kernels; \
  extern const AttentionKernels attention_kernels;    \
  extern const HintKernels hint_kernels;              \
  extern const RkdKernels rkd_kernels;                \
  extern const SimilarityKernels similarity_kernels;  \
  extern const FspKernels fsp_kernels;                \
  extern const MetricsKernels metrics_kernels;        \
  extern const TopKKernels top_k_kernels;             \
  }
FASTKD_DECLARE(baseline)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(avx512)
#undef FASTKD_DECLARE

// The kernels in use: the best set that this machine has, until `use` names another.
const Kernels& kernels();
int available(const char** names);  // those that can run here, best first; at most 3
bool use(const char* isa);

}  // namespace fastkd
