// Gradients for another grad_output, which is read on the device: the host waits for nothing.
#include <algorithm>

#include "device.h"
#include "launch.h"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // accesses in flight in every thread
constexpr int kMostGradients = 64;

template <class S>
struct Gradients {
  S* data[kMostGradients];
  int64_t last_chunk[kMostGradients];  // not this one's
  int64_t size[kMostGradients];
  int count;
};

template <class S>
constexpr int64_t kChunk = int64_t(kThreads) * kAtOnce * (kAccess / sizeof(S));

template <class S, class G>
__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const __grid_constant__ Gradients<S> gradients, const G* grad_output) {
  constexpr int N = kAccess / sizeof(S);
  if (*grad_output == G(1)) return;
  const S factor = S(*grad_output);
  int j = 0;
  for (int64_t chunk = blockIdx.x; chunk < gradients.last_chunk[gradients.count - 1];
       chunk += gridDim.x) {
    while (chunk >= gradients.last_chunk[j]) ++j;
    const int64_t begin = (chunk - (j > 0 ? gradients.last_chunk[j - 1] : 0)) * kChunk<S>;
    S* const data = gradients.data[j] + begin;
    const int64_t left = gradients.size[j] - begin;
    if (left < kChunk<S> || reinterpret_cast<uintptr_t>(data) % kAccess) {
      for (int64_t i = threadIdx.x; i < left && i < kChunk<S>; i += kThreads) data[i] *= factor;
      continue;
    }
    Vector<S, N> v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) v[i] = load<N>(data + (i * kThreads + threadIdx.x) * N);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int k = 0; k < N; ++k) v[i].values[k] *= factor;
      store<N>(v[i], data + (i * kThreads + threadIdx.x) * N);
    }
  }
}

template <class S, class G>
void multiply_all(const Tensors& all, DType dtype, const Tensor& grad_output,
                  const Stream& stream) {
  constexpr auto kernel = multiply_kernel<S, G>;
  Gradients<S> gradients{};
  int64_t chunks = 0;
  const auto flush = [&] {
    if (gradients.count == 0) return;
    Grid grid{1, kThreads};
    grid.blocks = std::min(chunks, resident_clusters(kernel, grid, stream));
    launch(kernel, grid, stream, gradients, reinterpret_cast<const G*>(grad_output.data));
    gradients.count = 0;
    chunks = 0;
  };
  for (const Tensor& gradient : all) {
    const int64_t size = gradient.numel();
    if (gradient.dtype != dtype || size == 0) continue;
    chunks += (size + kChunk<S> - 1) / kChunk<S>;
    gradients.data[gradients.count] = reinterpret_cast<S*>(gradient.data);
    gradients.size[gradients.count] = size;
    gradients.last_chunk[gradients.count++] = chunks;
    if (gradients.count == kMostGradients) flush();
  }
  flush();
}

template <class G>
void multiply_by(const Tensors& gradients, const Tensor& grad_output, const Stream& stream) {
  multiply_all<float, G>(gradients, DType::f32, grad_output, stream);
  multiply_all<double, G>(gradients, DType::f64, grad_output, stream);
}

}  // namespace

void multiply(const Place& place, const Tensors& gradients, const Tensor& grad_output) {
  const Stream stream(place);
  (grad_output.dtype == DType::f64 ? multiply_by<double> : multiply_by<float>)(gradients,
                                                                               grad_output, stream);
}

}  // namespace fastkd::cuda
