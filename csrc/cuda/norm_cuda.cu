// The gradient norm: each block adds up one chunk of one gradient, then one block their sums.
//
// One read of the gradients bounds the time, so all 16-byte loads of a thread come before the first
// use, as in the step. Which element a thread takes follows from its index alone, and sums go
// through fixed trees without atomics: the result depends neither on the grid nor on addresses.
//
// float32 and 16-bit elements are added up in float32 within a thread, because float64 is slow on
// most GPUs. A power of two, from the thread's largest element, keeps squares from overflow and
// underflow. Across threads sums are float64. The relative error is at most 11 * 2^-24.
#include "cuda/launch.h"
#include "cuda/norm_cuda.h"

namespace radam {
namespace {

template <typename G>
constexpr int kVector = 16 / sizeof(G);

template <typename G>
constexpr int64_t kChunk = int64_t{kThreads} * kVectors * kVector<G>;

// The sum, or the larger one; NaN propagates.
template <bool kMaximum>
__device__ __forceinline__ double combine(double a, double b) {
  if (!kMaximum) return a + b;
  return a > b || a != a ? a : b;
}

// Combines a number of each thread; the result is valid in thread 0.
template <int kCount, bool kMaximum>
__device__ __forceinline__ double over_block(double number) {
  __shared__ double numbers[kCount];
  const int i = threadIdx.x;
  numbers[i] = number;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) numbers[i] = combine<kMaximum>(numbers[i], numbers[i + half]);
  }
  return numbers[0];
}

// The bits of |x| shifted left: in their order NaN is above infinity. Not masked, which a compiler
// may turn into a floating-point abs, whose NaN is unspecified.
__device__ __forceinline__ uint32_t doubled(float x) { return bit_cast<uint32_t>(x) << 1; }
__device__ __forceinline__ uint64_t doubled(double x) { return bit_cast<uint64_t>(x) << 1; }

// doubled() of the largest |x|.
template <typename G>
__device__ __forceinline__ auto largest(const Pack<G, kVector<G>> (&packs)[kVectors]) {
  auto found = doubled(widen(G{}));
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
#pragma unroll
    for (int j = 0; j < kVector<G>; ++j) {
      const auto other = doubled(widen(packs[k].x[j]));
      found = found > other ? found : other;
    }
  }
  return found;
}

// The sum of the magnitudes or squares of x * scale, vector by vector.
template <Norm kNorm, typename G, typename T>
__device__ __forceinline__ T sum_of_powers(const Pack<G, kVector<G>> (&packs)[kVectors], T scale) {
  T sum = 0;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    T part = 0;
#pragma unroll
    for (int j = 0; j < kVector<G>; ++j) {
      const T x = widen(packs[k].x[j]) * scale;
      part += kNorm == kTwo ? x * x : x < 0 ? -x : x;
    }
    sum += part;
  }
  return sum;
}

// What a thread has of its elements.
template <Norm kNorm, typename G>
__device__ __forceinline__ double of_thread(const Pack<G, kVector<G>> (&packs)[kVectors]) {
  using T = decltype(widen(G{}));
  if constexpr (kNorm == kLargest) {
    return bit_cast<T>(largest(packs) >> 1);
  } else if constexpr (sizeof(T) == 8) {
    return sum_of_powers<kNorm>(packs, T{1});
  } else {
    // Scaled by 2^(127 - e), where e is the biased exponent of the largest element, the largest is
    // below 2; below 4 if e is 254, because 2^-127 would be subnormal.
    uint32_t exponent = largest(packs) >> 24;
    exponent = exponent < 253 ? exponent : 253;
    const T sum = sum_of_powers<kNorm>(packs, bit_cast<float>((254 - exponent) << 23));
    const int back = (kNorm == kTwo ? 2 : 1) * (static_cast<int>(exponent) - 127);
    return sum * bit_cast<double>(static_cast<uint64_t>(1023 + back) << 52);
  }
}

template <Norm kNorm, typename G>
__global__ void __launch_bounds__(kThreads)
    radam_norm_kernel(const __grid_constant__ CudaPowerSum arguments) {
  constexpr int kN = kVector<G>;
  const auto numel = [&](int64_t index) { return arguments.grads[index].numel; };
  const Chunk chunk = chunk_of_block<kChunk<G>>(arguments.work, arguments.run, numel);
  const G* const grads = static_cast<const G*>(arguments.grads[chunk.index].data) + chunk.begin;

  Pack<G, kN> packs[kVectors];
  const int first = threadIdx.x * kN;
  if (chunk.count == kChunk<G> && reinterpret_cast<uintptr_t>(grads) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) packs[k] = load<G, kN>(grads + first + k * kThreads * kN);
  } else {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int i = first + k * kThreads * kN + j;
        packs[k].x[j] = i < chunk.count ? grads[i] : G{};
      }
    }
  }
  const double partial = over_block<kThreads, kNorm == kLargest>(of_thread<kNorm>(packs));
  if (threadIdx.x == 0) arguments.partials[blockIdx.x] = partial;
}

// One block, of as many threads as there can be.
constexpr int kTotalThreads = 1024;

template <bool kMaximum>
__global__ void __launch_bounds__(kTotalThreads)
    radam_norm_total_kernel(const __grid_constant__ CudaPowerSum arguments) {
  double mine = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < arguments.blocks; i += kTotalThreads) {
    mine = combine<kMaximum>(mine, arguments.partials[i]);
  }
  const double total = over_block<kTotalThreads, kMaximum>(mine);
  if (threadIdx.x == 0) *arguments.sum = total;
}

using Kernel = void (*)(CudaPowerSum);

template <Norm kNorm>
Kernel kernel_for(DType dtype) {
  return visit_dtype(dtype, [](auto element) -> Kernel {
    return radam_norm_kernel<kNorm, Storage<decltype(element)>>;
  });
}

}  // namespace

int64_t cuda_norm_chunk(DType dtype) {
  return visit_dtype(dtype, [](auto element) { return kChunk<Storage<decltype(element)>>; });
}

void power_sum_cuda(const CudaPowerSum& power_sum) {
  if (power_sum.run < 0 || power_sum.run > 30) {
    throw std::runtime_error("run: expected 0 to 30, got " + std::to_string(power_sum.run));
  }
  const Kernel kernel = power_sum.norm == kLargest ? kernel_for<kLargest>(power_sum.dtype)
                        : power_sum.norm == kOne   ? kernel_for<kOne>(power_sum.dtype)
                                                   : kernel_for<kTwo>(power_sum.dtype);
  const Kernel total =
      power_sum.norm == kLargest ? radam_norm_total_kernel<true> : radam_norm_total_kernel<false>;
  launch(kernel, power_sum, power_sum.blocks, kThreads, power_sum.device, power_sum.stream,
         "radam_norm_kernel");
  launch(total, power_sum, 1, kTotalThreads, power_sum.device, power_sum.stream,
         "radam_norm_total_kernel");
}

void load_norm_kernels() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, radam_norm_kernel<kTwo, float>), "radam_norm_kernel");
  check(cudaFuncGetAttributes(&attributes, radam_norm_total_kernel<false>),
        "radam_norm_total_kernel");
}

}  // namespace radam
