// Attention's gradients from slopes: all features of a call in one launch.
#include <type_traits>

#include "attention_gradient.h"
#include "attention_plan.h"

namespace fastkd::cuda {

using namespace maps;

namespace {

// The last samples first: forward has just read them.
template <class A, class Fold, class Table>
__global__ void __launch_bounds__(kMapThreads, blocks_together<Fold>(5))
    attention_backward_kernel(const __grid_constant__ Table table, const A* grad_output,
                              bool by_sample, const typename Fold::Raise power) {
  const uint32_t unit = gridDim.x - 1 - blockIdx.x;
  int j = 0;
  while (unit >= table.jobs[j].last_unit) ++j;
  const Side& side = table.jobs[j];
  const uint32_t sample = (unit - side.first_unit) / side.gradient.units;
  const int64_t first = int64_t(sample) * side.gradient.positions;
  const Slopes<A> slopes{reinterpret_cast<const A*>(side.slopes) + first,
                         Fold::kHasArgmax ? side.argmax + first : nullptr,
                         grad_output[by_sample ? side.first_row + sample : 0]};
  gradient_unit<A, Fold>(side.gradient, table.axes, sample,
                         unit - side.first_unit - sample * side.gradient.units, power, slopes);
}

}  // namespace

void attention_backward(const Place& place, const Tensor& grad_output, const Tensors& features,
                        const Tensors& slopes, const Tensors& argmax, const Tensors& gradients,
                        const MapParameters& p) {
  const int64_t batch = features[0].sizes[0];
  if (batch == 0) return;
  const Stream stream(place);
  // Features are those of the students, and of the teachers after them where they were asked for.
  const bool by_sample = grad_output.ndim == 2;
  const size_t pairs = by_sample ? size_t(grad_output.sizes[0]) : features.size();
  const bool is_max = p.kind == MapKind::max_pow;
  const Cut cut(features, p.channel_dim, grad_output.dtype == DType::f64);
  Plan<Side> plan;
  for (size_t j = 0; j < features.size(); ++j) {
    Side side{};
    // The features at the argmax are not read: the gradient's layout alone decides.
    side.gradient = PassBuilder(is_max ? gradients[j] : features[j], gradients[j], cut, plan.axes);
    side.slopes = slopes[j].data;
    side.argmax = argmax_of(argmax, j);
    side.first_row = uint32_t(j % pairs * size_t(batch));
    plan.add(side, uint64_t(batch) * side.gradient.units);
  }
  with_arithmetic(grad_output.dtype, [&](auto* arithmetic) {
    using A = std::remove_pointer_t<decltype(arithmetic)>;
    with_fold<A>(p, [&](auto* kept) {
      using Fold = std::remove_pointer_t<decltype(kept)>;
      with_tables<Fold>(plan, [&](auto& table, size_t) {
        using Table = std::remove_reference_t<decltype(table)>;
        constexpr auto kernel = attention_backward_kernel<A, Fold, Table>;
        const int64_t units = table.jobs[table.count - 1].last_unit;
        launch(kernel, {units, kMapThreads}, stream, table,
               reinterpret_cast<const A*>(grad_output.data), by_sample, typename Fold::Raise(p.p));
      });
    });
  });
}

}  // namespace fastkd::cuda
