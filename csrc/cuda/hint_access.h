// How a warp reads and writes a unit of the hint kernel (see hint_jobs.h).
#pragma once

#include "hint_jobs.h"
#include "storage.h"

namespace fastkd::cuda {

// Each returns the lane's sum of squared differences, and writes factor · (student − teacher)
// where there is a gradient. Each reads before it writes: the gradient may lie in the student's
// place.

// Over a stretch of `count` elements: a whole unit, or less at the end of a run.
template <class S, class T>
__device__ float along_vectors(const S* student, const T* teacher, S* gradient, int count,
                               float factor) {
  constexpr Vectors kVectors(sizeof(S), sizeof(T));
  constexpr int N = kVectors.length, kStep = kWarp * N;
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  const auto meet = [&](Vector<S, N>& s, const Vector<T, N>& t) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float difference = widen(s.values[i]) - widen(t.values[i]);
      sum += difference * difference;
      s.values[i] = narrow<S>(factor * difference);
    }
  };
  const S* const student_lane = student + lane * N;
  const T* const teacher_lane = teacher + lane * N;
  S* const gradient_lane = gradient + lane * N;
  if (count == kVectors.unit) {
    Vector<S, N> s[kVectors.at_once];
    Vector<T, N> t[kVectors.at_once];
#pragma unroll
    for (int v = 0; v < kVectors.at_once; ++v) {
      s[v] = load<N>(student_lane + v * kStep);
      t[v] = load<N>(teacher_lane + v * kStep);
    }
#pragma unroll
    for (int v = 0; v < kVectors.at_once; ++v) {
      meet(s[v], t[v]);
      if (gradient != nullptr) store<N>(s[v], gradient_lane + v * kStep);
    }
    return sum;
  }
#pragma unroll 1
  for (int first = 0; first + lane * N + N <= count; first += kStep) {
    Vector<S, N> s = load<N>(student_lane + first);
    meet(s, load<N>(teacher_lane + first));
    if (gradient != nullptr) store<N>(s, gradient_lane + first);
  }
  const int last = count / N * N + lane;
  if (last < count) {
    const float difference = widen(student[last]) - widen(teacher[last]);
    sum += difference * difference;
    if (gradient != nullptr) gradient[last] = narrow<S>(factor * difference);
  }
  return sum;
}

// Rows are padded, so that neither side of the square meets in one bank.
using Square = float[kSquare][kSquare + 1];

// Over a square, or less of it at the edges. The student, and its gradient, lie side by side along
// the job's length and the teacher along its width.
template <class S, class T>
__device__ float across_square(const S* student, const T* teacher, S* gradient, const Job& job,
                               int width, int length, float factor, Square& square) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % kWarp;
  float values[kAtOnce];
  for (int first = 0; first < length; first += kAtOnce) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < length && lane < width)
        values[i] = widen(teacher[(first + i) * job.length.stride[kTeacher] + lane]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < length && lane < width) square[first + i][lane] = values[i];
  }
  __syncwarp();
  float sum = 0;
  for (int first = 0; first < width; first += kAtOnce) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < width && lane < length)
        values[i] = widen(student[(first + i) * job.width.stride[kStudent] + lane]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= width || lane >= length) continue;
      const float difference = values[i] - square[lane][first + i];
      sum += difference * difference;
      if (gradient != nullptr)
        gradient[(first + i) * job.width.stride[kGradient] + lane] = narrow<S>(factor * difference);
    }
  }
  __syncwarp();
  return sum;
}

// Over width × length elements, at most kElements.
template <class A, class S, class T>
__device__ A over_elements(Elements<S> student, Elements<T> teacher, Elements<S> gradient,
                           const Job& job, int width, int length, A factor) {
  constexpr int kAtOnce = kElements / kWarp;
  A s[kAtOnce], t[kAtOnce];
  const auto place = [&](int i, int& row, int& column) {
    const int element = i * kWarp + threadIdx.x % kWarp;
    row = element / length;
    column = element - row * length;
    return row < width;
  };
  const auto offset = [&](int row, int column, Side side) {
    return row * job.width.stride[side] + column * job.length.stride[side];
  };
  int row, column;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (!place(i, row, column)) continue;
    s[i] = A(student.load(offset(row, column, kStudent)));
    t[i] = A(teacher.load(offset(row, column, kTeacher)));
  }
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (!place(i, row, column)) continue;
    const A difference = s[i] - t[i];
    sum += difference * difference;
    if (gradient.data != nullptr)
      gradient.store(offset(row, column, kGradient), factor * difference);
  }
  return sum;
}

}  // namespace fastkd::cuda
