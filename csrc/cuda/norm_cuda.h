// The CUDA kernels of the gradient norm: what a launch takes, all of it numbers and raw pointers.
#pragma once

#include "core/dtypes.h"
#include "cuda/step_cuda.h"

namespace radam {

// What is taken of all elements: the largest, the sum, or the sum of squares, of |g|.
enum Norm : int { kLargest = 0, kOne = 1, kTwo = 2 };

// A row of the table of gradients: dense, aligned to an element.
struct Gradient {
  const void* data;
  int64_t numel;
};
static_assert(sizeof(Gradient) == 16, "Python makes these rows");

struct CudaPowerSum {
  DType dtype;
  Norm norm;
  const Gradient* grads;  // on the device
  const Work* work;       // on the device
  int run;                // log2 of the blocks that a row of work is for
  int64_t blocks;
  double* partials;  // on the device: one for each block
  double* sum;       // on the device: the result
  int device;
  void* stream;  // a cudaStream_t
};

// Elements in a chunk.
int64_t cuda_norm_chunk(DType dtype);

// Launches and returns at once. Throws std::runtime_error with CUDA's reason.
void power_sum_cuda(const CudaPowerSum& power_sum);

// Loads the kernels to the current device. Throws as well.
void load_norm_kernels();

}  // namespace radam
