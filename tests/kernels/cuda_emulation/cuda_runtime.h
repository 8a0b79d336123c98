// Stands in for the CUDA runtime, so that csrc/cuda/step_cuda.cu compiles as plain C++ as it
// stands: blocks and threads become loops. Only for kernels without barriers, shuffles or shared
// memory.
#pragma once

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));  // UBSan finds a vector access that is not aligned
struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8)));

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 blockIdx, threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
struct cudaFuncAttributes {};

inline int emulated_device = 0;  // the current one, of two
// Of a grid of several blocks, run just these.
inline unsigned emulated_first_block = 0, emulated_end_block = ~0u;

inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid device" : ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  emulated_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

// The device that was current when a kernel ran last: the launcher's business, and so a test's.
inline int emulated_launch_device = -1;
// Launches so far, and the bytes that they carried to the device as their arguments.
inline int64_t emulated_launches = 0, emulated_uploaded = 0;

// What a launch uploads: of `words` in its argument, `count` are meant.
template <typename Argument>
auto emulated_upload(const Argument& argument, int)
    -> decltype(argument.count * int64_t{sizeof(argument.words[0])}) {
  return argument.count * int64_t{sizeof(argument.words[0])};
}
template <typename Argument>
int64_t emulated_upload(const Argument&, long) {
  return 0;
}

template <typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument),
                               const Argument& argument) {
  emulated_launch_device = emulated_device;
  ++emulated_launches;
  emulated_uploaded += emulated_upload(argument, 0);
  const unsigned blocks = config->gridDim.x;
  for (unsigned block = 0; block < blocks; ++block) {
    if (blocks > 1 && block < emulated_first_block) block = emulated_first_block;
    if (blocks > 1 && block >= emulated_end_block) break;
    for (unsigned thread = 0; thread < config->blockDim.x; ++thread) {
      blockIdx = dim3(block, 0, 0);
      threadIdx = dim3(thread, 0, 0);
      kernel(argument);
    }
  }
  return cudaSuccess;
}
