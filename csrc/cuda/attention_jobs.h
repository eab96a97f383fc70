// What the launches of attention do: how a block goes through the units of a feature map, and the
// tables of pairs that the kernels get as a parameter.
#pragma once

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../attention.h"
#include "device.h"

namespace fastkd::cuda::maps {

constexpr int kMapThreads = 128;  // of a block

// Bytes of a feature map that a block reads: a part of the call's, so that there are enough blocks,
// within limits. What a block does besides takes as long as 16 KiB.
constexpr int64_t kLeastUnit = 16384, kMostUnit = 65536;
constexpr int64_t kUnitsOfCall = 4096;
constexpr int kLeastPositions = 4;  // of a unit, where a map has several

// Bytes of a bulk copy. Six blocks of a multiprocessor then have 190 KB of copies under way; a part
// of the call's is less, so that all multiprocessors get as many.
constexpr int64_t kMostCopy = 32768;
constexpr int64_t kCopiesOfCall = 2048;

// planes: positions lie side by side (NCHW), or nothing does. A thread has a column, which is one
// vector or element of a plane, and goes through the planes.
// rows: channels lie side by side (channels_last, tokens). Some lanes of a warp have a position.
// copied_rows: rows without gaps. A unit is one stretch of memory, which a bulk copy brings into
// shared memory.
enum class Access : int { planes, rows, copied_rows };

struct Axis {
  int64_t size;
  int64_t stride[2];
};

// A way through features, or through features and their gradient at a time, which share a dtype.
//
// Columns of access by planes repeat after a period of one plane, or of several where only several
// are whole vectors: planes of 7×7 float32 are read as one stretch, 49 vectors to four planes, and
// a thread stays at its positions all the same.
struct Pass {
  char* data[2];
  DType dtype;
  Access access;
  bool by_vectors;
  bool is_once;          // that the features are read, so that a cache need not keep them
  int first_axis, axes;  // of positions that are no single stretch
  uint32_t channels, positions;
  uint32_t width;                              // columns of a unit, or its positions at least
  uint32_t units;                              // of a sample
  uint32_t columns, planes;                    // of a period
  uint32_t periods;                            // of a sample
  uint32_t lanes;                              // that share a position
  int64_t sample[2], channel[2], position[2];  // strides
};

// The slopes of one pair's sides, and the sums that lead to them. `units` of a sample come in the
// order student's map, teacher's map, sums, slopes; those from the sums on are of an earlier
// sample, whose maps are then complete.
enum Stage { kStudentMap, kTeacherMap, kSums, kSlopes, kStages };

struct Pair {
  Pass maps[2];
  char* slopes[2];  // before, the maps; of max_pow, the features at the argmax
  int32_t* argmax[2];
  double* squares;  // of a map's units, by samples
  double* sums;     // of a map's parts, by samples, if there are several
  uint32_t batch, positions, parts;
  uint32_t units[kStages], lag[kStages];  // of a sample, and how many samples later
  uint32_t first_unit, last_unit;         // the last is not this pair's
  uint32_t first_sample;                  // of all pairs'
  // Slots in which every stage has a sample, by their units; and the units of one.
  uint32_t steady_begin, steady_end, in_slot;
  bool wants_teacher;

  // A slot has the maps of one sample, and the rest of earlier ones.
  __host__ __device__ uint32_t units_before(uint32_t slot) const {
    uint32_t before = 0;
    for (int stage = 0; stage < kStages; ++stage) {
      const uint32_t begun = slot > lag[stage] ? slot - lag[stage] : 0;
      before += (begun < batch ? begun : batch) * units[stage];
    }
    return before;
  }
};

// A features' gradient in backward.
struct Side {
  Pass gradient;
  const char* slopes;
  const int32_t* argmax;
  uint32_t first_unit, last_unit;
  uint32_t first_row;  // in a grad_output of one number a sample
};

// The jobs of one launch, as a parameter of the kernel.
template <class Job, int Jobs, int Axes>
struct Table {
  static constexpr int kJobs = Jobs, kAxes = Axes;
  Job jobs[Jobs];
  Axis axes[Axes];
  int count;
};

inline uint32_t parts_of(int64_t size, int64_t of) { return uint32_t((size + of - 1) / of); }

// Positions of a map for which one block finds the sums and the slopes.
constexpr uint32_t kPart = 4096;

inline uint32_t least_power_of_2(int64_t size, uint32_t most) {
  uint32_t power = 1;
  while (power < size && power < most) power *= 2;
  return power;
}

// How a call's features are cut into units.
struct Cut {
  int channel_dim;
  bool in_double;
  int64_t unit_bytes;
  int64_t copy_bytes = 0;  // 0: no bulk copies

  Cut(const Tensors& features, int channel_dim, bool in_double, bool has_bulk_copies = false)
      : channel_dim(channel_dim), in_double(in_double) {
    int64_t bytes = 0;
    for (const Tensor& one : features) bytes += one.numel() * size_of(one.dtype);
    unit_bytes = std::clamp(bytes / kUnitsOfCall, kLeastUnit, kMostUnit);
    if (has_bulk_copies) copy_bytes = std::clamp(bytes / kCopiesOfCall, kLeastUnit, kMostCopy);
  }
};

// Builds the pass of features, and of a gradient if there is one; its axes go to the end of `axes`.
class PassBuilder {
 public:
  PassBuilder(const Tensor& features, const Tensor& gradient, const Cut& cut,
              std::vector<Axis>& axes)
      : tensors_{&features, gradient ? &gradient : &features}, axes_(axes), cut_(cut) {
    int channel_dim = cut.channel_dim;
    if (channel_dim < 0) channel_dim += features.ndim;
    int64_t count = 1;
    for (int d = 1; d < features.ndim; ++d)
      if (d != channel_dim) count *= features.sizes[d];
    if (count > INT32_MAX || features.sizes[channel_dim] > INT32_MAX)
      throw std::invalid_argument("attention: too many positions or channels for a GPU");
    pass_.positions = uint32_t(count);
    pass_.channels = uint32_t(features.sizes[channel_dim]);
    pass_.dtype = features.dtype;
    pass_.first_axis = int(axes.size());
    for (int t = 0; t < 2; ++t) {
      pass_.data[t] = tensors_[t]->data;
      pass_.sample[t] = tensors_[t]->strides[0];
      pass_.channel[t] = tensors_[t]->strides[channel_dim];
    }
    find_axes(channel_dim);
    const bool are_rows = is(1, pass_.channel) && pass_.axes == 0;
    pass_.access =
        are_rows && (count == 1 || !is(1, pass_.position)) ? Access::rows : Access::planes;
    if (pass_.access == Access::planes)
      cut_planes();
    else
      cut_rows();
  }

  operator const Pass&() const { return pass_; }

 private:
  // Positions along the fewest axes, innermost last.
  void find_axes(int channel_dim) {
    const Tensor& features = *tensors_[0];
    size_t first = axes_.size();
    for (int d = 1; d < features.ndim; ++d) {
      if (d == channel_dim || features.sizes[d] == 1) continue;
      const Axis axis{features.sizes[d], {tensors_[0]->strides[d], tensors_[1]->strides[d]}};
      const bool merges = axes_.size() > first &&
                          axes_.back().stride[0] == axis.stride[0] * axis.size &&
                          axes_.back().stride[1] == axis.stride[1] * axis.size;
      if (merges)
        axes_.back() = {axes_.back().size * axis.size, {axis.stride[0], axis.stride[1]}};
      else
        axes_.push_back(axis);
    }
    pass_.axes = int(axes_.size() - first);
    for (int t = 0; t < 2; ++t)
      pass_.position[t] = pass_.axes == 1 ? axes_.back().stride[t] : pass_.axes == 0 ? 1 : 0;
    if (pass_.axes > 1) return;
    axes_.resize(first);
    pass_.axes = 0;
  }

  static bool is(int64_t value, const int64_t (&strides)[2]) {
    return strides[0] == value && strides[1] == value;
  }
  static bool are_whole(const int64_t (&strides)[2], int64_t of) {
    return strides[0] % of == 0 && strides[1] % of == 0;
  }
  bool is_aligned() const {
    return uintptr_t(pass_.data[0]) % 16 == 0 && uintptr_t(pass_.data[1]) % 16 == 0;
  }

  void cut_planes() {
    const int64_t whole = 16 / size_of(pass_.dtype), positions = pass_.positions;
    const int64_t elements = pass_.channels * positions;
    const int64_t shared = std::gcd(positions, whole);
    const bool may = !cut_.in_double && pass_.axes == 0 && is(1, pass_.position) && is_aligned() &&
                     are_whole(pass_.sample, whole);
    const bool are_planes_whole = positions % whole == 0 && are_whole(pass_.channel, whole);
    const bool is_stretch = is(positions, pass_.channel) && elements % whole == 0 &&
                            elements / whole <= UINT32_MAX && positions / shared <= kMapThreads;
    pass_.by_vectors = may && (are_planes_whole || is_stretch);
    const int64_t length = pass_.by_vectors ? whole : 1;
    pass_.planes = pass_.by_vectors && !are_planes_whole ? uint32_t(whole / shared) : 1;
    pass_.columns = uint32_t(pass_.planes * positions / length);
    pass_.periods = pass_.channels / pass_.planes;
    const int64_t bytes = pass_.channels * length * size_of(pass_.dtype);
    const int64_t least = pass_.by_vectors ? 8 : 32;  // 128 bytes, or a warp's
    const int64_t fitting = cut_.unit_bytes / bytes / least * least;
    pass_.width = uint32_t(std::min<int64_t>(
        pass_.planes > 1 ? pass_.columns : std::clamp<int64_t>(fitting, least, kMapThreads),
        pass_.columns));
    pass_.units = parts_of(pass_.columns, pass_.width);
    pass_.width = parts_of(pass_.columns, pass_.units);
  }

  void cut_rows() {
    const int64_t whole = 16 / size_of(pass_.dtype);
    pass_.by_vectors = !cut_.in_double && is_aligned() &&
                       (are_whole(pass_.position, whole) || pass_.positions == 1) &&
                       pass_.channels % whole == 0 && are_whole(pass_.sample, whole);
    const int64_t length = pass_.by_vectors ? whole : 1;
    pass_.lanes = least_power_of_2(pass_.channels / length, 32);
    const int64_t bytes = int64_t(pass_.channels) * size_of(pass_.dtype);  // of a position
    const int64_t least = std::min<int64_t>(kLeastPositions, pass_.positions);
    const bool are_dense = pass_.positions == 1 || is(pass_.channels, pass_.position);
    if (cut_.copy_bytes > 0 && pass_.by_vectors && are_dense && least * bytes <= kMostCopy) {
      pass_.access = Access::copied_rows;
      pass_.units = parts_of(pass_.positions, std::max(cut_.copy_bytes / bytes, least));
      pass_.width = pass_.positions / pass_.units;
      return;
    }
    const int64_t at_once = kMapThreads / pass_.lanes;  // positions
    const int64_t rounded = std::max<int64_t>(cut_.unit_bytes / bytes / at_once * at_once, at_once);
    pass_.width = uint32_t(
        std::min<int64_t>(std::max<int64_t>(rounded, 2 * kLeastPositions), pass_.positions));
    pass_.units = parts_of(pass_.positions, pass_.width);
  }

  Pass pass_{};
  const Tensor* tensors_[2];
  std::vector<Axis>& axes_;
  const Cut cut_;
};

}  // namespace fastkd::cuda::maps
