// Stands in for CUDA's headers where kernels are compiled as C++ for the host: what fastkd's
// sources use, and a little more. What is missing does not compile. Threads are fibers; see grid.h.
#pragma once

#include "cuda_on_host.h"
#include "device_functions.h"
#include "device_types.h"
#include "runtime_api.h"
