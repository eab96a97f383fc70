// A feature map as samples × channels × positions, whatever its memory layout.
#pragma once

#include "memory.h"
#include "parallel.h"

namespace fastkd::FASTKD_ISA {

enum class Layout { planar, interleaved, scattered };

// planar: positions lie side by side (NCHW). interleaved: channels do (channels_last, tokens).
// scattered: neither; a table holds the offset of each position.
struct Positions {
  int64_t batch, channels, count = 1;
  int64_t batch_stride, channel_stride, position_stride = 1;
  int ndim = 0;
  int64_t sizes[kMaxDims], strides[kMaxDims];

  // Each feature map counts a negative channel_dim from its own end.
  Positions(const Tensor& t, int channel_dim) : batch(t.sizes[0]), batch_stride(t.strides[0]) {
    if (channel_dim < 0) channel_dim += t.ndim;
    channels = t.sizes[channel_dim];
    channel_stride = t.strides[channel_dim];
    for (int d = 1; d < t.ndim; ++d) {
      if (d == channel_dim || t.sizes[d] == 1) continue;
      count *= t.sizes[d];
      if (ndim > 0 && strides[ndim - 1] == t.strides[d] * t.sizes[d]) {
        sizes[ndim - 1] *= t.sizes[d];
      } else {
        sizes[ndim++] = t.sizes[d];
      }
      strides[ndim - 1] = t.strides[d];
    }
    if (ndim == 1) position_stride = strides[0];
  }

  Layout layout() const {
    if (ndim > 1) return Layout::scattered;
    if (position_stride == 1 && count > 1) return Layout::planar;
    if (channel_stride == 1) return Layout::interleaved;
    return position_stride == 1 ? Layout::planar : Layout::scattered;
  }

  // Whether a sample is one stretch of memory.
  bool is_dense() const {
    const Layout found = layout();
    return (found == Layout::planar && channel_stride == count) ||
           (found == Layout::interleaved && position_stride == channels);
  }

  int64_t offset(int64_t position) const {
    int64_t out = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      out += position % sizes[d] * strides[d];
      position /= sizes[d];
    }
    return out;
  }
};

}  // namespace fastkd::FASTKD_ISA
