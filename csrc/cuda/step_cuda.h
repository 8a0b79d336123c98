// The CUDA kernel's interface: what a launch takes, all of it numbers and raw pointers.
#pragma once

#include <cstdint>

#include "core/advance.h"
#include "core/segment.h"

namespace radam {

// Where a run of 2^CudaStep::run blocks begins: at this chunk of this segment. The blocks after the
// first walk on from there, so a table of a few thousand rows serves any number of elements.
struct Work {
  int32_t segment, chunk;
};
static_assert(sizeof(Work) == 8, "Python makes these rows");

struct CudaStep {
  DTypeSet dtypes;
  const Segment* segments;      // on the device
  const uintptr_t* grads;       // on the device: the gradient of each segment
  const LowMemory* low_memory;  // on the device: one for each segment, or null
  const Work* work;             // on the device
  int run;                      // log2 of the blocks that a row of work is for
  int64_t blocks;
  const StepScalars* scalars;         // on the host, copied into the launch; or null
  int64_t scalars_count;              // at most kInlineScalars, if on the host
  const StepScalars* device_scalars;  // on the device, where there are more or they are made there
  const double* factor;               // on the device: multiplies the gradients; or null
  int device;
  void* stream;  // a cudaStream_t
};

// One step of the counters on a device, all pointers there.
struct CudaAdvance {
  const Counter* counters;
  int64_t count;
  const Hyperparameters* groups;
  StepScalars* scalars;  // one row a counter: the result
  Scaling scaling;
  int device;
  void* stream;
};

// So many rows of StepScalars travel as kernel arguments: nothing to upload, nothing to overwrite.
constexpr int kInlineScalars = 32;

// Elements in a chunk, for a dtype set.
int64_t cuda_chunk(const DTypeSet& dtypes);

// These launch and return at once. They throw std::runtime_error with CUDA's reason.
void step_cuda(const CudaStep& step);
void step_low_memory_cuda(const CudaStep& step);  // of step_cuda(), for is_low_memory(dtypes)
void advance_cuda(const CudaAdvance& advance);

// Copies `size` bytes, a multiple of eight, to the device. They travel as arguments of launches:
// when this returns, `from` is free again, and a graph that captures it keeps them as long as it
// lives.
void upload_cuda(void* to, const void* from, int64_t size, int device, void* stream);

// Why no kernel here runs on a device; an empty string if they do.
const char* why_not_cuda(int device);

}  // namespace radam
