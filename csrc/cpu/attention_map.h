// The map of one sample, and the features' gradient from its slopes, in each memory layout.
#pragma once

#include <limits>

#include "ahead.h"
#include "kernels.h"
#include "positions.h"
#include "power.h"

namespace fastkd::FASTKD_ISA {

constexpr int kAtOnce = 4;  // channels added before the running sum is touched

// ---- Sums over channels ------------------------------------------------------------------------

template <class A, class S, class P>
void sum_planar(const S* x, int64_t channels, int64_t stride, int n, const P& power, A* to) {
  constexpr int W = Simd<A>::width;
  for (int i = 0; i < n; ++i) to[i] = 0;
  // Planes of a page and more lie too far apart for the processor to see the next ones coming.
  const bool fetches = stride * int64_t(sizeof(S)) >= thresholds.map_page;
  int64_t c = 0;
  for (; c + kAtOnce <= channels; c += kAtOnce, x += kAtOnce * stride) {
    int i = 0;
    for (; i + W <= n; i += W) {
      for (int k = 0; fetches && k < kAtOnce; ++k) fetch(x + (kAtOnce + k) * stride + i, W);
      auto part = power(load_as<A>(x + i));
      for (int k = 1; k < kAtOnce; ++k) part += power(load_as<A>(x + k * stride + i));
      store(load(to + i) + part, to + i);
    }
    if (i < n) {
      auto part = power(load_part<A>(x + i, n - i, A(0)));
      for (int k = 1; k < kAtOnce; ++k)
        part += power(load_part<A>(x + k * stride + i, n - i, A(0)));
      store_part(load_part<A>(to + i, n - i, A(0)) + part, to + i, n - i);
    }
  }
  for (; c < channels; ++c, x += stride)
    for (int i = 0; i < n; i += W) {
      const int lanes = n - i < W ? n - i : W;
      const auto term = power(load_part<A>(x + i, lanes, A(0)));
      store_part(load_part<A>(to + i, lanes, A(0)) + term, to + i, lanes);
    }
}

template <class A, class S, class P>
vec_t<A> sum_interleaved(const S* x, int64_t channels, const P& power) {
  constexpr int W = Simd<A>::width;
  vec_t<A> even = {}, odd = {};
  int64_t c = 0;
  for (; c + 2 * W <= channels; c += 2 * W) {
    even += power(load_as<A>(x + c));
    odd += power(load_as<A>(x + c + W));
  }
  for (; c < channels; c += W)
    even += c + W <= channels ? power(load_as<A>(x + c))
                              : power(load_part<A>(x + c, int(channels - c), A(0)));
  return even + odd;
}

template <class A, class S, class P>
A sum_scattered(const S* x, int64_t channels, int64_t stride, const P& power) {
  constexpr int W = Simd<A>::width;
  vec_t<A> total = {};
  for (int64_t c = 0; c < channels; c += W) {
    vec_t<A> v = {};
    for (int64_t k = c; k < channels && k < c + W; ++k) v[k - c] = A(widen(x[k * stride]));
    total += power(v);
  }
  return sum<A>(total);
}

// ---- Maxima over channels, and the lowest channel that attains each ----------------------------

// In each lane the largest magnitude so far and the channel that it was first seen in. NaN wins, as
// it does in torch, and then stays.
template <class A>
struct Best {
  vec_t<A> value = splat<A>(-1);
  mask_t<A> channel = {};

  void see(vec_t<A> x, mask_t<A> at) {
    const auto a = abs<A>(x);
    const mask_t<A> wins = (a > value) | ((a != a) & (value == value));
    value = wins ? a : value;
    channel = wins ? at : channel;
  }
};

template <class A, class S>
void max_planar(const S* x, int64_t channels, int64_t stride, int n, A* to, int32_t* argmax) {
  constexpr int W = Simd<A>::width;
  typedef int32_t indices __attribute__((vector_size(W * sizeof(int32_t))));
  for (int i = 0; i < n; ++i) {
    to[i] = -1;
    argmax[i] = 0;
  }
  for (int64_t c = 0; c < channels; c += kAtOnce) {
    const int some = channels - c < kAtOnce ? int(channels - c) : kAtOnce;
    over_vectors<A>(n, [&](int i, auto lanes) {
      for (int k = 0; k < some; ++k) fetch(x + (c + kAtOnce + k) * stride + i, W);
      Best<A> best;
      indices found = {};
      std::memcpy(&found, argmax + i, lanes * sizeof(int32_t));
      best.value = load_lanes<A>(to + i, lanes, A(0));
      best.channel = __builtin_convertvector(found, mask_t<A>);
      for (int k = 0; k < some; ++k)
        best.see(load_lanes<A>(x + (c + k) * stride + i, lanes, A(0)), mask_t<A>{} + int(c + k));
      store_lanes<A>(best.value, to + i, lanes);
      found = __builtin_convertvector(best.channel, indices);
      std::memcpy(argmax + i, &found, lanes * sizeof(int32_t));
    });
  }
}

// At a tie between lanes, the lowest channel: never one past the last, whose 0 beats nothing.
template <class A, class S>
void max_interleaved(const S* x, int64_t channels, A* to, int32_t* argmax) {
  constexpr int W = Simd<A>::width;
  mask_t<A> at;
  for (int k = 0; k < W; ++k) at[k] = k;
  Best<A> best;
  over_vectors<A>(channels, [&](int64_t c, auto lanes) {
    best.see(load_lanes<A>(x + c, lanes, A(0)), at);
    at += W;
  });
  const A largest = max_of<A>(best.value);
  const mask_t<A> is_nan = best.value != best.value;
  const bool any_nan = fold(is_nan, [](auto a, auto b) { return a | b; });
  const mask_t<A> attains = any_nan ? is_nan : best.value == largest;
  const mask_t<A> never = mask_t<A>{} + std::numeric_limits<int32_t>::max();
  *argmax =
      int32_t(fold(attains ? best.channel : never, [](auto a, auto b) { return a < b ? a : b; }));
  *to = any_nan ? A(NAN) : largest;
}

template <class A, class S>
void max_scattered(const S* x, int64_t channels, int64_t stride, A* to, int32_t* argmax) {
  A best = -1;
  for (int64_t c = 0; c < channels; ++c) {
    const A a = std::fabs(A(widen(x[c * stride])));
    if (a > best || (a != a && best == best)) {
      best = a;
      *argmax = int32_t(c);
    }
  }
  *to = best;
}

// ---- One chunk of positions of one sample ------------------------------------------------------

// The unnormalised map. `argmax` is for max_pow only.
template <class A, class S, int halves>
void map_chunk(const S* x, const Positions& where, MapKind kind, const Power<A, halves>& power,
               int64_t first, int n, A* to, int32_t* argmax) {
  const Layout layout = where.layout();
  const int64_t step = where.position_stride;
  if (kind == MapKind::max_pow) {
    if (layout == Layout::planar)
      max_planar(x + first, where.channels, where.channel_stride, n, to, argmax);
    else if (layout == Layout::interleaved)
      for (int i = 0; i < n; ++i)
        max_interleaved(x + (first + i) * step, where.channels, to + i, argmax + i);
    else
      for (int i = 0; i < n; ++i)
        max_scattered(x + where.offset(first + i), where.channels, where.channel_stride, to + i,
                      argmax + i);
    constexpr int W = Simd<A>::width;
    for (int i = 0; i < n; i += W) {
      const int lanes = n - i < W ? n - i : W;
      store_part(power(load_part<A>(to + i, lanes, A(0))), to + i, lanes);
    }
  } else if (layout == Layout::planar) {
    sum_planar(x + first, where.channels, where.channel_stride, n, power, to);
  } else if (layout == Layout::interleaved) {
    const auto one = [&](int i) {
      return sum_interleaved<A>(x + (first + i) * step, where.channels, power);
    };
    constexpr int W = Simd<A>::width;
    int i = 0;
    for (; i + W <= n; i += W) {
      vec_t<A> parts[W];
      for (int k = 0; k < W; ++k) parts[k] = one(i + k);
      store(sums<A>(parts), to + i);
    }
    for (; i < n; ++i) to[i] = sum<A>(one(i));
  } else {
    for (int i = 0; i < n; ++i)
      to[i] = sum_scattered<A>(x + where.offset(first + i), where.channels, where.channel_stride,
                               power);
  }
}

// ---- The gradient slope · dF/dA ----------------------------------------------------------------

// Elements begin to end of planes that follow one another: they are one stretch of memory, along
// which the slopes repeat. `slopes` goes on by a vector past its last position, so that a vector
// may begin at any and no plane has an edge.
template <class A, class S, int halves>
void gradient_of_planes(const S* x, S* g, const A* slopes, int64_t positions,
                        const Power<A, halves>& power, int64_t begin, int64_t end,
                        bool non_temporal, const Ahead& ahead) {
  int64_t position = begin % positions;
  write_vectors<A>(g + begin, end - begin, non_temporal, [&](int64_t i, auto lanes) {
    ahead.step((begin + i) * int64_t(sizeof(S)));
    const auto gradient = load_lanes<A>(slopes + position, lanes, A(0)) *
                          power.derivative(load_lanes<A>(x + begin + i, lanes, A(0)));
    position += lanes % positions;
    if (position >= positions) position -= positions;
    return gradient;
  });
}

// One chunk of positions in any layout.
template <class A, class S, int halves>
void gradient_chunk(const S* x, const Positions& from, S* g, const Positions& to,
                    const Power<A, halves>& power, int64_t first, int n, const A* slopes,
                    bool non_temporal, const Ahead& ahead) {
  const Layout layout = from.layout() == to.layout() ? from.layout() : Layout::scattered;
  const int64_t channels = from.channels;
  if (layout == Layout::planar) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* source = x + c * from.channel_stride + first;
      S* target = g + c * to.channel_stride + first;
      over_vectors<A>(n, [&](int i, auto lanes) {
        const auto gradient = load_lanes<A>(slopes + i, lanes, A(0)) *
                              power.derivative(load_lanes<A>(source + i, lanes, A(0)));
        store_lanes<A>(gradient, target + i, lanes);
      });
    }
  } else if (layout == Layout::interleaved) {
    // Every position begins where a vector may be streamed to, or none is.
    const int64_t step = to.count > 1 ? to.position_stride : channels;
    non_temporal = non_temporal && step % All<A>::value == 0 && until_aligned<A>(g, 1) == 0;
    for (int i = 0; i < n; ++i) {
      const S* source = x + (first + i) * from.position_stride;
      S* target = g + (first + i) * to.position_stride;
      over_vectors<A>(channels, [&](int64_t c, auto lanes) {
        ahead.step(((first + i) * channels + c) * int64_t(sizeof(S)));
        const auto gradient = slopes[i] * power.derivative(load_lanes<A>(source + c, lanes, A(0)));
        if (non_temporal && lanes == All<A>::value)
          stream(gradient, target + c);
        else
          store_lanes<A>(gradient, target + c, lanes);
      });
    }
  } else {
    for (int i = 0; i < n; ++i) {
      const S* source = x + from.offset(first + i);
      S* target = g + to.offset(first + i);
      for (int64_t c = 0; c < channels; ++c) {
        const A value = A(widen(source[c * from.channel_stride]));
        narrow(slopes[i] * power.derivative(splat<A>(value))[0], target + c * to.channel_stride);
      }
    }
  }
}

// Of one sample of max_pow: from slopes by the map to slopes by the features at the argmax.
template <class A, class S, int halves>
void slopes_at_argmax(const S* x, const Positions& where, const Power<A, halves>& power, A* slopes,
                      const int32_t* argmax) {
  for (int64_t i = 0; i < where.count; ++i) {
    const A value = A(widen(x[where.offset(i) + argmax[i] * where.channel_stride]));
    slopes[i] *= power.derivative(splat<A>(value))[0];
  }
}

// One chunk of positions of max_pow: all goes to the feature at the argmax.
template <class A, class S>
void gradient_at_argmax(S* g, const Positions& to, int64_t first, int n, const A* slopes,
                        const int32_t* argmax) {
  const bool planar = to.layout() == Layout::planar;
  // Zeros first, along whichever of channels and positions lies side by side.
  for (int64_t c = 0; planar && c < to.channels; ++c)
    std::memset(g + c * to.channel_stride + first, 0, n * sizeof(S));
  for (int i = 0; i < n; ++i) {
    S* target = g + to.offset(first + i);
    if (!planar && to.channel_stride == 1)
      std::memset(target, 0, to.channels * sizeof(S));
    else if (!planar)
      for (int64_t c = 0; c < to.channels; ++c) narrow(A(0), target + c * to.channel_stride);
    narrow(slopes[i], target + argmax[i] * to.channel_stride);
  }
}

}  // namespace fastkd::FASTKD_ISA
