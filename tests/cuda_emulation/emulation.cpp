// The CUDA kernel and its launcher, emulated, behind a C interface for ctypes.
#include "../../csrc/step_cuda.cu"

extern "C" {

int64_t emulated_chunk(int param, int grad, int state) {
  using namespace radam;
  return cuda_chunk(
      {static_cast<DType>(param), static_cast<DType>(grad), static_cast<DType>(state)});
}

// 0, or 1 where the launcher threw; the device is the caller's again either way.
int emulated_step(const void* segments, const void* work, int64_t blocks, int param, int grad,
                  int state, const void* scalars, int64_t count, const void* device_scalars,
                  int device) {
  using namespace radam;
  try {
    step_cuda({{static_cast<DType>(param), static_cast<DType>(grad), static_cast<DType>(state)},
               static_cast<const Segment*>(segments),
               static_cast<const Work*>(work),
               blocks,
               static_cast<const StepScalars*>(scalars),
               count,
               static_cast<const StepScalars*>(device_scalars),
               device,
               nullptr});
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}

int emulated_current_device() { return emulated_device; }
}
