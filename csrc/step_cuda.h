// The CUDA kernel's interface: what a launch takes, all of it numbers and raw pointers.
#pragma once

#include <cstdint>

#include "step.h"

namespace radam {

// What one block does: which chunk of which segment. Python makes these rows, two int32 each.
struct Work {
  int32_t segment, chunk;
};

struct CudaStep {
  DTypeSet dtypes;
  const Segment* segments;  // on the device
  const Work* work;         // on the device, one row a block
  int64_t blocks;
  const StepScalars* scalars;         // on the host, copied into the launch; or null
  int64_t scalars_count;              // at most kInlineScalars, if on the host
  const StepScalars* device_scalars;  // on the device, where there are more
  int device;
  void* stream;  // a cudaStream_t
};

// So many rows of StepScalars travel as kernel arguments: nothing to upload, nothing to overwrite.
constexpr int kInlineScalars = 32;

// Elements in a chunk, for a dtype set.
int64_t cuda_chunk(const DTypeSet& dtypes);

// Launches the step and returns at once. Throws std::runtime_error with CUDA's reason.
void step_cuda(const CudaStep& step);

// Why no kernel here runs on a device; an empty string if they do.
const char* why_not_cuda(int device);

}  // namespace radam
