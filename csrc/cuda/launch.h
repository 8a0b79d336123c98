// What the CUDA kernels share: wide accesses, the chunk that a block works on, and launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/step_cuda.h"

namespace radam {
namespace {

// bench/gpu/tune.py sets these by -D; also RADAM_STREAMING, for the cache hints.
#ifndef RADAM_THREADS
#define RADAM_THREADS 256
#endif
#ifndef RADAM_VECTORS
#define RADAM_VECTORS 4
#endif
constexpr int kThreads = RADAM_THREADS;
constexpr int kVectors = RADAM_VECTORS;  // that a thread loads before it uses the first

template <typename Element>
using Storage = typename Element::Storage;

// N elements, in accesses of 16 bytes, or of 8 where they are no more.
template <typename T, int N>
struct Pack {
  using Word = std::conditional_t<N * sizeof(T) % 16 == 0, uint4, uint2>;
  static constexpr int kWords = N * sizeof(T) / sizeof(Word);
  union {
    Word words[kWords];
    T x[N];
  };
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < pack.kWords; ++i) {
    const auto* const word = reinterpret_cast<const typename Pack<T, N>::Word*>(from) + i;
#ifdef RADAM_STREAMING
    pack.words[i] = __ldcs(word);
#else
    pack.words[i] = *word;
#endif
  }
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
#pragma unroll
  for (int i = 0; i < pack.kWords; ++i) {
    auto* const word = reinterpret_cast<typename Pack<T, N>::Word*>(to) + i;
#ifdef RADAM_STREAMING
    __stcs(word, pack.words[i]);
#else
    *word = pack.words[i];
#endif
  }
}

// What one block works on.
struct Chunk {
  int64_t index;  // of the tensor
  int64_t begin;  // its first element
  int count;      // its elements
};

// The chunk of this block, of kElements or fewer; numel(i) is the size of tensor i.
template <int64_t kElements, typename Numel>
__device__ __forceinline__ Chunk chunk_of_block(const Work* table, int run, const Numel& numel) {
  const Work work = table[blockIdx.x >> run];
  int64_t index = work.segment;
  int64_t chunk = work.chunk + (blockIdx.x & ((1u << run) - 1));
  const auto chunks = [&] { return (numel(index) + kElements - 1) / kElements; };
  for (; chunk >= chunks(); ++index) chunk -= chunks();
  const int64_t begin = chunk * kElements;
  const int64_t left = numel(index) - begin;
  return {index, begin, static_cast<int>(left < kElements ? left : kElements)};
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Makes a device current, and the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename Argument>
void launch(void (*kernel)(Argument), const Argument& argument, int64_t blocks, int threads,
            int device, void* stream, const char* name) {
  if (blocks < 0 || blocks > INT32_MAX) {
    throw std::runtime_error("too many blocks for one launch: " + std::to_string(blocks));
  }
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, argument), name);
}

}  // namespace
}  // namespace radam
