// The CUDA kernels of plain dtypes, and the two small ones around a step.
#include <algorithm>

#include "cuda/norm_cuda.h"
#include "cuda/step_kernel.h"

namespace radam {
namespace {

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
  is_low_memory(step.dtypes) ? step_low_memory_cuda(step) : launch_step<false>(step);
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
