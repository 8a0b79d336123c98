// The CUDA kernels: a block steps one chunk of one segment; and the two small ones around it.
//
// The step is bound by memory: per float32 parameter 28 bytes move (p, g, m, v in; p, m, v out). An
// H100 can issue some 280 instructions in that time; the update needs 50, IEEE division and
// square root among them. So the design keeps many bytes in flight: a thread issues all of its
// 16-byte loads, of four vectors from each of four streams, before it uses the first. Measured on
// an H100, 2^28 float32 elements, as a share of a copy that moves as many bytes: one vector at a
// time 95%, two 96%, four 98%, and four without streaming cache hints (ld.cs, st.cs) 99.6%. Fewer
// threads are resident then, as four vectors take 104 registers. That is enough: 128 KiB in flight
// on a multiprocessor, where 25 KiB hide the latency. bench/gpu/machine_code.py counts all this for
// every dtype set, and bench/gpu/tune.py measures variants of the constants below.
#include <algorithm>

#include "core/update.h"
#include "cuda/launch.h"
#include "cuda/norm_cuda.h"
#include "cuda/step_cuda.h"

namespace radam {
namespace {

template <typename P>
using Compute = std::conditional_t<sizeof(P) == 8, double, float>;

// StepScalars as the kernel wants them; the host makes them where it can.
template <typename T>
struct Row {
  Scalars<T> s;
  Action action;

  RADAM_INLINE Row() : Row(StepScalars{}) {}
  RADAM_INLINE explicit Row(const StepScalars& scalars) : s(scalars), action(action_of(scalars)) {}
};

template <typename T>
struct Arguments {
  const Segment* segments;
  const uintptr_t* grads;
  const Work* work;
  int run;
  const StepScalars* device_scalars;
  const double* factor;
  Row<T> rows[kInlineScalars];
};

// A row of scalars, with the factor in float64, as on the host.
template <typename T>
__device__ __forceinline__ Row<T> row_of(const Arguments<T>& arguments, int64_t index) {
  if (arguments.device_scalars) {
    StepScalars scalars = arguments.device_scalars[index];
    if (arguments.factor) scalars.grad_scale *= *arguments.factor;
    return Row<T>(scalars);
  }
  Row<T> row = arguments.rows[index];
  if (arguments.factor) {
    row.s.grad_scale = static_cast<T>(static_cast<double>(row.s.grad_scale) * *arguments.factor);
  }
  return row;
}

// Elements of a vector: 16 bytes of the widest stream, so that neighbours in a warp access
// neighbouring bytes of every stream. bench/gpu/tune.py tries RADAM_NARROWEST.
template <typename P, typename G, typename S>
#ifdef RADAM_NARROWEST
constexpr int kVector = 16 / std::min({sizeof(P), sizeof(G), sizeof(S)});
#else
constexpr int kVector = 16 / std::max({sizeof(P), sizeof(G), sizeof(S)});
#endif

template <typename P, typename G, typename S>
constexpr int64_t kChunk = int64_t{kThreads} * kVectors * kVector<P, G, S>;

template <typename P, typename G, typename S, typename T = Compute<P>>
__device__ __forceinline__ void step_element(P& p, G g, S& m, S& v, const Scalars<T>& s, bool l2,
                                             Action action) {
  T p_ = widen(p), m_ = widen(m), v_ = widen(v);
  radam_update(p_, static_cast<T>(widen(g)), m_, v_, s, l2, action);
  p = narrow<P>(p_);
  m = narrow<S>(m_);
  v = narrow<S>(v_);
}

__device__ __forceinline__ bool aligned(const Segment& s, uintptr_t grad) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(s.param) | grad |
                        reinterpret_cast<uintptr_t>(s.exp_avg) |
                        reinterpret_cast<uintptr_t>(s.exp_avg_sq);
  return all % 16 == 0;
}

template <typename P, typename G, typename S>
__global__ void __launch_bounds__(kThreads)
    radam_step_kernel(const __grid_constant__ Arguments<Compute<P>> arguments) {
  using T = Compute<P>;
  constexpr int kN = kVector<P, G, S>;
  constexpr int64_t kElements = kChunk<P, G, S>;

  const auto numel = [&](int64_t index) { return arguments.segments[index].numel; };
  const auto [index, begin, count] =
      chunk_of_block<kElements>(arguments.work, arguments.run, numel);
  const Segment& segment = arguments.segments[index];
  const uintptr_t grad = arguments.grads[index];
  const Row<T> row = row_of(arguments, segment.scalars);
  const Scalars<T>& s = row.s;
  const Action action = row.action;
  if (action == kSkip) return;
  const bool l2 = s.weight_decay != 0;

  P* const params = static_cast<P*>(segment.param) + begin;
  const G* const grads = reinterpret_cast<const G*>(grad) + begin;
  S* const exp_avgs = static_cast<S*>(segment.exp_avg) + begin;
  S* const exp_avg_sqs = static_cast<S*>(segment.exp_avg_sq) + begin;

  // Steps some vectors of this thread: all loads come before the first use.
  constexpr int kStride = kThreads * kN;
  const auto step_vectors = [&](int first, auto vectors) {
    constexpr int kCount = decltype(vectors)::value;
    Pack<P, kN> p[kCount];
    Pack<G, kN> g[kCount];
    Pack<S, kN> m[kCount], v[kCount];
#pragma unroll
    for (int k = 0, i = first; k < kCount; ++k, i += kStride) {
      p[k] = load<P, kN>(params + i);
      g[k] = load<G, kN>(grads + i);
      m[k] = load<S, kN>(exp_avgs + i);
      v[k] = load<S, kN>(exp_avg_sqs + i);
    }
#pragma unroll
    for (int k = 0, i = first; k < kCount; ++k, i += kStride) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        step_element(p[k].x[j], g[k].x[j], m[k].x[j], v[k].x[j], s, l2, action);
      }
      store(params + i, p[k]);
      store(exp_avgs + i, m[k]);
      store(exp_avg_sqs + i, v[k]);
    }
  };

  int done = 0;  // up to here, whole vectors
  if (aligned(segment, grad)) {
    done = count - count % kN;
    const int first = threadIdx.x * kN;
    if (count == kElements) {
      step_vectors(first, std::integral_constant<int, kVectors>());
    } else {
#pragma unroll 1
      for (int i = first; i < done; i += kStride) {
        step_vectors(i, std::integral_constant<int, 1>());
      }
    }
  }
  // The rest of a segment, or all of one that does not start on 16 bytes.
#pragma unroll 1
  for (int i = done + threadIdx.x; i < count; i += kThreads) {
    step_element(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], s, l2, action);
  }
}

// Few, because float64 is slow on most GPUs: a thousand counters shall use many SMs.
constexpr int kAdvanceThreads = 32;

__global__ void __launch_bounds__(kAdvanceThreads)
    radam_advance_kernel(const __grid_constant__ CudaAdvance a) {
  const int64_t i = int64_t{blockIdx.x} * kAdvanceThreads + threadIdx.x;
  if (i < a.count) a.scalars[i] = advance(a.counters[i], a.groups, a.scaling);
}

// What fits into the arguments of a launch, whose limit is 4 KB before CUDA 12.1.
struct Payload {
  static constexpr int kWords = 500;
  uint64_t* to;
  int64_t count;
  uint64_t words[kWords];
};

__global__ void __launch_bounds__(kThreads)
    radam_upload_kernel(const __grid_constant__ Payload payload) {
  for (int i = threadIdx.x; i < payload.count; i += kThreads) payload.to[i] = payload.words[i];
}

}  // namespace

int64_t cuda_chunk(const DTypeSet& dtypes) {
  return visit_dtypes(dtypes, [](auto p, auto g, auto s) {
    return kChunk<Storage<decltype(p)>, Storage<decltype(g)>, Storage<decltype(s)>>;
  });
}

void step_cuda(const CudaStep& step) {
  if (step.run < 0 || step.run > 30) {
    throw std::runtime_error("run: expected 0 to 30, got " + std::to_string(step.run));
  }
  if (!step.device_scalars && (!step.scalars || step.scalars_count > kInlineScalars)) {
    throw std::runtime_error(std::to_string(step.scalars_count) + " rows of scalars; at most " +
                             std::to_string(kInlineScalars) + " travel with the launch");
  }
  visit_dtypes(step.dtypes, [&](auto p, auto g, auto s) {
    constexpr DTypeSet kSet = {decltype(p)::kDType, decltype(g)::kDType, decltype(s)::kDType};
    if constexpr (!is_low_memory(kSet)) {
      using P = Storage<decltype(p)>;
      using T = Compute<P>;
      Arguments<T> arguments = {step.segments,       step.grads,  step.work, step.run,
                                step.device_scalars, step.factor, {}};
      for (int64_t i = 0; !step.device_scalars && i < step.scalars_count; ++i) {
        arguments.rows[i] = Row<T>(step.scalars[i]);
      }
      launch(radam_step_kernel<P, Storage<decltype(g)>, Storage<decltype(s)>>, arguments,
             step.blocks, kThreads, step.device, step.stream, "radam_step_kernel");
    }
  });
}

void advance_cuda(const CudaAdvance& advance) {
  launch(radam_advance_kernel, advance, (advance.count + kAdvanceThreads - 1) / kAdvanceThreads,
         kAdvanceThreads, advance.device, advance.stream, "radam_advance_kernel");
}

void upload_cuda(void* to, const void* from, int64_t size, int device, void* stream) {
  constexpr int64_t kBytes = sizeof(Payload::words);
  for (int64_t done = 0; done < size; done += kBytes) {
    const int64_t bytes = std::min(size - done, kBytes);
    Payload payload = {reinterpret_cast<uint64_t*>(static_cast<char*>(to) + done), bytes / 8, {}};
    memcpy(payload.words, static_cast<const char*>(from) + done, static_cast<size_t>(bytes));
    launch(radam_upload_kernel, payload, 1, kThreads, device, stream, "radam_upload_kernel");
  }
}

const char* why_not_cuda(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    // This loads them, too: while a graph is captured might be a bad moment for it.
    check(cudaFuncGetAttributes(&attributes, radam_step_kernel<float, float, float>),
          "radam_step_kernel");
    check(cudaFuncGetAttributes(&attributes, radam_advance_kernel), "radam_advance_kernel");
    check(cudaFuncGetAttributes(&attributes, radam_upload_kernel), "radam_upload_kernel");
    load_norm_kernels();
  } catch (const std::runtime_error&) {
    return cudaGetErrorString(cudaGetLastError());
  }
  return "";
}

}  // namespace radam
