// The CUDA kernel: a block steps one chunk of one segment.
//
// It is bound by memory. Per fp32 parameter 28 bytes move (p, g, m, v in; p, m, v out), which at
// 4.3 TB/s takes 6.5 ps; so the design is about keeping enough of them in flight. Every thread
// issues its 16-byte loads of all four streams before it uses the first, and 256-thread blocks of
// few registers fill an SM. What is read or written once passes the caches marked as streaming.
// IEEE division and square root cost tens of instructions an element, which that time hides.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "step_cuda.h"

namespace radam {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // that a thread steps, one after another

struct Arguments {
  const Segment* segments;
  const Work* work;
  const StepScalars* device_scalars;
  StepScalars scalars[kInlineScalars];
};

template <typename P>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// Elements a thread steps at once: 16 bytes of the narrowest stream.
template <typename P, typename G, typename S>
constexpr int kVector =
    16 / (sizeof(P) < sizeof(G) ? (sizeof(P) < sizeof(S) ? sizeof(P) : sizeof(S))
                                : (sizeof(G) < sizeof(S) ? sizeof(G) : sizeof(S)));

template <typename P, typename G, typename S>
constexpr int64_t kChunk = int64_t{kThreads} * kVectors * kVector<P, G, S>;

// N elements in as many 16-byte accesses as it takes.
template <typename T, int N>
struct alignas(16) Pack {
  static constexpr int kWords = N * sizeof(T) / 16;
  union {
    uint4 words[kWords];
    T x[N];
  };
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < pack.kWords; ++i) {
    pack.words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  }
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
#pragma unroll
  for (int i = 0; i < pack.kWords; ++i) {
    __stcs(reinterpret_cast<uint4*>(to) + i, pack.words[i]);
  }
}

template <typename P, typename G, typename S, typename T = typename Compute<P>::type>
__device__ __forceinline__ void step_element(P& p, G g, S& m, S& v, const Scalars<T>& s, bool l2,
                                             Action action) {
  T p_ = widen(p), m_ = widen(m), v_ = widen(v);
  radam_update(p_, static_cast<T>(widen(g)), m_, v_, s, l2, action);
  p = narrow<P>(p_);
  m = narrow<S>(m_);
  v = narrow<S>(v_);
}

__device__ __forceinline__ bool aligned(const Segment& s) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(s.param) | reinterpret_cast<uintptr_t>(s.grad) |
                        reinterpret_cast<uintptr_t>(s.exp_avg) |
                        reinterpret_cast<uintptr_t>(s.exp_avg_sq);
  return all % 16 == 0;
}

template <typename P, typename G, typename S>
__global__ void __launch_bounds__(kThreads)
    radam_step_kernel(const __grid_constant__ Arguments arguments) {
  using T = typename Compute<P>::type;
  constexpr int kN = kVector<P, G, S>;

  const Work work = arguments.work[blockIdx.x];
  const Segment segment = arguments.segments[work.segment];
  const StepScalars* rows = arguments.device_scalars ? arguments.device_scalars : arguments.scalars;
  const StepScalars& row = rows[segment.scalars];
  const Scalars<T> s(row);
  const Action action = static_cast<Action>(static_cast<int>(row.action));
  if (action == kSkip) return;
  const bool l2 = s.weight_decay != 0;

  P* const params = static_cast<P*>(segment.param);
  const G* const grads = static_cast<const G*>(segment.grad);
  S* const exp_avgs = static_cast<S*>(segment.exp_avg);
  S* const exp_avg_sqs = static_cast<S*>(segment.exp_avg_sq);
  const int64_t begin = work.chunk * kChunk<P, G, S>;
  const int64_t left = segment.numel - begin;
  const int64_t end = left < kChunk<P, G, S> ? segment.numel : begin + kChunk<P, G, S>;

  int64_t done = begin;  // up to here, whole vectors
  if (aligned(segment)) {
    done = end - (end - begin) % kN;
    for (int64_t i = begin + threadIdx.x * kN; i < done; i += kThreads * kN) {
      auto p = load<P, kN>(params + i);
      const auto g = load<G, kN>(grads + i);
      auto m = load<S, kN>(exp_avgs + i);
      auto v = load<S, kN>(exp_avg_sqs + i);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        step_element(p.x[j], g.x[j], m.x[j], v.x[j], s, l2, action);
      }
      store(params + i, p);
      store(exp_avgs + i, m);
      store(exp_avg_sqs + i, v);
    }
  }
  // The rest of a segment, or all of one that does not start on 16 bytes.
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {
    step_element(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], s, l2, action);
  }
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
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Calls visit(P{}, G{}, S{}) with the types of a supported dtype set.
template <typename Visit>
auto with_dtype(DType dtype, const Visit& visit) {
  if (dtype == kBFloat16) return visit(bfloat16{});
  if (dtype == kFloat16) return visit(float16{});
  return visit(float{});
}

template <typename Visit>
auto with_dtypes(const DTypeSet& dtypes, const Visit& visit) {
  if (dtypes.param == kFloat64) return visit(double{}, double{}, double{});
  return with_dtype(dtypes.param, [&](auto p) {
    return with_dtype(dtypes.grad, [&](auto g) {
      return with_dtype(dtypes.state, [&](auto s) { return visit(p, g, s); });
    });
  });
}

}  // namespace

int64_t cuda_chunk(const DTypeSet& dtypes) {
  return with_dtypes(
      dtypes, [](auto p, auto g, auto s) { return kChunk<decltype(p), decltype(g), decltype(s)>; });
}

void step_cuda(const CudaStep& step) {
  if (step.blocks == 0) return;
  if (step.blocks < 0 || step.blocks > INT32_MAX) {
    throw std::runtime_error("too many blocks for one launch: " + std::to_string(step.blocks));
  }
  if (!step.device_scalars && (!step.scalars || step.scalars_count > kInlineScalars)) {
    throw std::runtime_error(std::to_string(step.scalars_count) + " rows of scalars; at most " +
                             std::to_string(kInlineScalars) + " travel with the launch");
  }
  Arguments arguments = {step.segments, step.work, step.device_scalars, {}};
  for (int64_t i = 0; !step.device_scalars && i < step.scalars_count; ++i) {
    arguments.scalars[i] = step.scalars[i];
  }
  const DeviceGuard guard(step.device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(step.blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(step.stream);
  with_dtypes(step.dtypes, [&](auto p, auto g, auto s) {
    check(cudaLaunchKernelEx(&config, radam_step_kernel<decltype(p), decltype(g), decltype(s)>,
                             arguments),
          "radam_step_kernel");
  });
}

const char* why_not_cuda(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, radam_step_kernel<float, float, float>),
          "radam_step_kernel");
  } catch (const std::runtime_error&) {
    return cudaGetErrorString(cudaGetLastError());
  }
  return "";
}

}  // namespace radam
