// Teachers that kept k classes of each row, and a student whose classes are shards: the sums of
// those here that no slot lists, in one read of each row.
#include "top_k_plan.h"
#include "top_k_row.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// Arithmetic in float64 takes twice the registers.
template <class A, bool kIsColumns>
__global__ void __launch_bounds__(kIsColumns ? kColumnThreads : kBlockRowThreads,
                                  (kIsColumns ? 4 : 2) / (sizeof(A) == 8 ? 2 : 1))
    top_k_sums_kernel(const __grid_constant__ TopKCall of, int64_t vectors, const Tickets) {
  const TopKPasses<A, kIsColumns> passes(of, shared_memory<PassesShared<A>>(), vectors);
  over_rows<kIsColumns>(of.call, [&](uint32_t row) {
    RowState<A> found;
    if (!ignores(of.call, row)) found = passes.unlisted_sums(passes.row_of(row));
    const A hard = of.call.has_hard ? found.hard : found.student;
    if (passes.leads)
      of.sums[row] = {double(found.student_max), double(found.student), double(hard), found.logits};
  });
}

}  // namespace
}  // namespace logits

void top_k_sums(const Place& place, const Tensor& student, const Tensor& indices,
                const Tensor& labels, const Tensor& sums, const Tensor& /* scratch */,
                bool listed_only, int64_t first, const SoftTargetParameters& p,
                const Tensors& temperatures) {
  using namespace logits;
  if (student.numel() == 0) return;
  const Stream stream(place);
  // Where the softmax at T is over the slots alone, these sums are for the cross-entropy.
  SoftTargetParameters own = p;
  if (listed_only) own.temperature = 1;
  const Tensors at_one;
  const Tensors& heat = listed_only ? at_one : temperatures;
  TopKCall of{};
  const bool are_columns =
      describe(of, student, indices, labels, {}, listed_only, first, own, heat);
  of.sums = sums.as<UnlistedSums>();
  with_form(of.call, are_columns, [&](auto arithmetic, auto columns) {
    using A = decltype(arithmetic);
    launch_over_rows<A, columns.value>(top_k_sums_kernel<A, columns.value>, of, of.call, 0, {},
                                       stream);
  });
}

}  // namespace fastkd::cuda
