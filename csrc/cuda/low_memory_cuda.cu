// The CUDA kernels of the formats for low memory.
#include "cuda/step_kernel.h"

namespace radam {

void step_low_memory_cuda(const CudaStep& step) { launch_step<true>(step); }

}  // namespace radam
