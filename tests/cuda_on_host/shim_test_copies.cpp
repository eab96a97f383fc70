// Asynchronous copies. A flag for each step says whether it is there.
#include "cuda_pipeline.h"
#include "shim_test.h"

namespace {

struct Steps {
  bool commit, wait, before_read, before_reuse;
  unsigned depth, groups_left;
};

// Rounds are read `depth` rounds after their copies began, by the threads of another warp.
template <class T>
__global__ void staged_kernel(const T* values, T* got, unsigned rounds, unsigned zeros,
                              Steps steps) {
  T* stages = shared<T>();
  const unsigned threads = blockDim.x, other = (threadIdx.x + warpSize) % threads;
  const auto stage = [&](unsigned round) { return stages + round % (steps.depth + 1) * threads; };
  for (unsigned round = 0; round < rounds + steps.depth; ++round) {
    if (round < rounds)
      __pipeline_memcpy_async(stage(round) + threadIdx.x, values + round * threads + threadIdx.x,
                              sizeof(T), zeros);
    if (steps.commit) __pipeline_commit();
    if (round < steps.depth) continue;
    if (steps.wait) __pipeline_wait_prior(steps.groups_left);
    if (steps.before_read) __syncthreads();
    const unsigned ready = round - steps.depth;
    got[ready * threads + other] = stage(ready)[other];
    if (steps.before_reuse) __syncthreads();
  }
}

template <class T>
Array<unsigned> staged(const Array<unsigned>& values, unsigned zeros, const Steps& steps) {
  Array<unsigned> got({values.shape(0), values.shape(1), values.shape(2)});
  const unsigned rounds = unsigned(values.shape(0)), threads = unsigned(values.shape(1));
  Launch{1, threads, unsigned((steps.depth + 1) * threads * sizeof(T))}(
      staged_kernel<T>, reinterpret_cast<const T*>(values.data()),
      reinterpret_cast<T*>(got.mutable_data()), rounds, zeros, steps);
  return got;
}

// The source changes while the copy is on its way.
__global__ void changed_kernel(float* source, float* got) {
  __pipeline_memcpy_async(shared<float>(), source, sizeof(float));
  __pipeline_commit();
  *source = 2;
  got[0] = *shared<float>();
  __threadfence();
  got[1] = *shared<float>();
  __pipeline_wait_prior(0);
  got[2] = *shared<float>();
}

Array<float> changed() {
  float source = 1;
  Array<float> got(3);
  Launch{1, 1, sizeof(float)}(changed_kernel, &source, got.mutable_data());
  return got;
}

}  // namespace

void define_copies(py::module_& m) {
  m.def(
      "staged",
      [](Array<unsigned> values, unsigned depth, unsigned groups_left, unsigned zeros, bool commit,
         bool wait, bool before_read, bool before_reuse) {
        const Steps steps{commit, wait, before_read, before_reuse, depth, groups_left};
        const py::ssize_t words = values.shape(2);
        if (words == 1) return staged<unsigned>(values, zeros, steps);
        return words == 2 ? staged<uint2>(values, zeros, steps)
                          : staged<uint4>(values, zeros, steps);
      },
      py::arg("values"), py::arg("depth"), py::arg("groups_left"), py::kw_only(),
      py::arg("zeros") = 0, py::arg("commit") = true, py::arg("wait") = true,
      py::arg("before_read") = true, py::arg("before_reuse") = true);
  m.def("changed", &changed);
}
