// The distance between two normalised maps of one sample, and what it is to each position of the
// unnormalised maps: the slopes. Map-sized work, in double where it is a sum.
#pragma once

#include "kernels.h"
#include "storage.h"

namespace fastkd::FASTKD_ISA {

// Σ f(i), vector by vector; lanes in arithmetic precision are folded into double every few.
template <class A, class F>
inline double sum_over(int64_t count, const F& f) {
  constexpr int W = Simd<A>::width;
  double total = 0;
  for (int64_t first = 0; first < count; first += 32 * W) {
    const int64_t last = first + 32 * W < count ? first + 32 * W : count;
    vec_t<A> part = {};
    int64_t i = first;
    for (; i + W <= last; i += W) part += f(i, W);
    if (i < last) part += f(i, int(last - i));
    total += double(sum<A>(part));
  }
  return total;
}

// In double: the squares of squares leave float32's range.
template <class A>
inline double sum_of_squares(const A* x, int64_t count) {
  constexpr int W = Simd<A>::width;
  double parts[W] = {}, total = 0;  // as many as there are lanes, so that it is a vector's work
  int64_t i = 0;
  for (; i + W <= count; i += W)
    for (int k = 0; k < W; ++k) parts[k] += double(x[i + k]) * double(x[i + k]);
  for (; i < count; ++i) total += double(x[i]) * double(x[i]);
  for (double part : parts) total += part;
  return total;
}

// Divides a map by its norm in place; what is left of the division is its scale.
template <class A>
struct Normalised {
  A* map;
  A inverse;
  bool clamped;  // the norm is below eps, and constant

  Normalised(A* raw, int64_t count, double eps) : map(raw) {
    const double norm = std::sqrt(sum_of_squares(raw, count));
    clamped = norm < eps;
    // A map of zeros stays zeros, however small eps is.
    inverse = norm == 0 ? A(0) : A(1 / (clamped ? eps : norm));
    for (int64_t i = 0; i < count; ++i) raw[i] *= inverse;
  }
  vec_t<A> operator()(int64_t i, int lanes) const { return load_part<A>(map + i, lanes, A(0)); }
};

// The distance's derivative with respect to student − teacher, at one vector.
template <class A>
struct Derivative {
  Distance distance;
  double order;
  double value;   // the norm
  double weight;  // of the loss
  int64_t count, ties;

  vec_t<A> operator()(vec_t<A> d) const {
    if (distance == Distance::mse) return d * A(2 * weight / double(count));
    if (value == 0) return vec_t<A>{};
    if (order == 2) return d * A(weight / value);
    const auto magnitude = abs<A>(d);
    auto out = vec_t<A>{};
    for (int i = 0; i < Simd<A>::width; ++i) {
      const double a = magnitude[i];
      double slope = 0;
      if (std::isinf(order))
        slope = a == value ? 1.0 / double(ties) : 0;
      else if (a != 0 || order == 1)
        slope = std::pow(a / value, order - 1);
      out[i] = d[i] == 0 ? A(0) : A(std::copysign(slope, double(d[i])) * weight);
      if (d[i] != d[i]) out[i] = d[i];
    }
    return out;
  }
};

// The norm of student − teacher of any order, and for infinity how many positions attain it.
template <class A, class D>
double norm_of(const D& difference, int64_t count, double order, int64_t* ties) {
  constexpr int W = Simd<A>::width;
  const auto square = [&](int64_t i, int lanes) {
    const auto d = difference(i, lanes);
    return d * d;
  };
  if (order == 2) return std::sqrt(sum_over<A>(count, square));
  double total = 0, largest = 0;
  const auto visit = [&](const auto& f) {
    for (int64_t i = 0; i < count; i += W) {
      const int lanes = count - i < W ? int(count - i) : W;
      const auto d = difference(i, lanes);
      for (int k = 0; k < lanes; ++k) f(std::fabs(double(d[k])));
    }
  };
  visit([&](double a) { largest = a > largest || a != a ? a : largest; });
  if (std::isinf(order)) {
    visit([&](double a) { *ties += a == largest; });
    return largest;
  }
  if (largest == 0 || largest != largest) return largest;
  visit([&](double a) { total += std::pow(a / largest, order); });
  return largest * std::pow(total, 1 / order);
}

// Returns the sample's loss. On entry `student` and `teacher` hold the unnormalised maps, on
// return the slopes; the teacher's only if asked for.
template <class A>
double distance_slopes(A* student, A* teacher, int64_t count, bool teacher_too,
                       const TransferParameters& p, double sample_scale, double eps) {
  constexpr int W = Simd<A>::width;
  const Normalised<A> s(student, count, eps), t(teacher, count, eps);
  const auto difference = [&](int64_t i, int lanes) { return s(i, lanes) - t(i, lanes); };
  Derivative<A> derivative{p.distance, p.order, 0, 0, count, 0};
  double loss;
  if (p.distance == Distance::mse) {
    derivative.weight = p.beta * sample_scale;
    loss = p.beta / double(count) * sum_over<A>(count, [&](int64_t i, int lanes) {
             const auto d = difference(i, lanes);
             return d * d;
           });
  } else {
    derivative.weight = p.beta / 2 * sample_scale;
    derivative.value = norm_of<A>(difference, count, p.order, &derivative.ties);
    loss = p.beta / 2 * derivative.value;
  }

  // Q = F / ‖F‖ turns a slope of Q into (slope − Q · ⟨Q, slope⟩) / ‖F‖.
  const auto inner = [&](const Normalised<A>& side) {
    if (side.clamped) return A(0);
    return A(sum_over<A>(count, [&](int64_t i, int lanes) {
      return side(i, lanes) * derivative(difference(i, lanes));
    }));
  };
  const A s_inner = inner(s), t_inner = teacher_too ? inner(t) : A(0);
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = count - i < W ? int(count - i) : W;
    const auto slope = derivative(difference(i, lanes));
    const auto s_slope = (slope - s(i, lanes) * s_inner) * s.inverse;
    if (teacher_too) store_part((t(i, lanes) * t_inner - slope) * t.inverse, teacher + i, lanes);
    store_part(s_slope, student + i, lanes);
  }
  return loss;
}

}  // namespace fastkd::FASTKD_ISA
