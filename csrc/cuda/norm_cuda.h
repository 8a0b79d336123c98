// The CUDA kernels of the gradient norm: what a launch takes, all of it numbers and raw pointers.
#pragma once

#include "core/dtypes.h"
#include "core/norm.h"
#include "cuda/step_cuda.h"

namespace radam {

struct CudaPowerSum {
  DType dtype;
  Norm norm;
  const GradientRow* grads;  // on the device
  const Work* work;          // on the device
  int run;                   // log2 of the blocks that a row of work is for
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
