// Stands in for the CUDA runtime, so that csrc/cuda/*.cu compile as plain C++ as they stand: blocks
// and threads become loops. Where a block has barriers or shuffles, its threads take turns between
// them, in ascending order.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

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
inline bool emulated_backwards = false;  // whether the last block runs first

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

inline void emulated_abort(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::abort();
}

// The threads of one block. Each that may wait has a stack of its own.
class EmulatedBlock {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    running_ = this;
    body_ = &body;
    if (fibers_.size() < threads) fibers_.resize(threads);
    for (Fiber& fiber : fibers_) fiber.done = false;
    threads_ = threads;
    meetings_.assign(1 + (threads + 31) / 32, {});
    resume(0, true);
    if (fibers_[0].done) {  // no other thread of such a block may wait
      for (unsigned i = 1; i < threads; ++i) {
        threadIdx = dim3(i, 0, 0);
        current_ = nullptr;
        body();
      }
      return;
    }
    for (unsigned i = 1; i < threads; ++i) resume(i, true);
    for (bool all_done = false; !all_done;) {
      moved_ = false;
      all_done = true;
      for (unsigned i = 0; i < threads; ++i) {
        if (!fibers_[i].done) resume(i, false);
        all_done &= fibers_[i].done;
      }
      if (!moved_) emulated_abort("a barrier or a shuffle that not all of its threads reach");
    }
  }

  // Waits until all threads of the block are here.
  static void wait() { running_->meet(0, ~0u, running_->threads_); }

  // What lane `from` of the warp has as `value`, which the lanes in `mask` exchange.
  template <typename T>
  static T exchange(unsigned mask, T value, unsigned from) {
    return running_->exchange_(mask, value, from);
  }

 private:
  struct Fiber {
    static constexpr size_t kStack = 64 << 10;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
    uint64_t values[2];  // for this exchange, and for the next, as not all have read this one yet
  };
  // Of all threads, and of each warp: how many have come, and how often all have.
  struct Meeting {
    unsigned mask, came, number;
  };

  void meet(unsigned group, unsigned mask, unsigned members) {
    if (!current_) emulated_abort("a barrier or a shuffle that not all of its threads reach");
    Fiber& me = *current_;
    Meeting& meeting = meetings_[group];
    if (meeting.came == 0) meeting.mask = mask;
    if (meeting.mask != mask) emulated_abort("a shuffle whose lanes disagree about its mask");
    const unsigned number = meeting.number;
    moved_ = true;
    if (++meeting.came == members) {
      meeting.came = 0;
      ++meeting.number;
    }
    while (meeting.number == number) swapcontext(&me.context, &scheduler_);
  }

  template <typename T>
  T exchange_(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a number in one register or two");
    const unsigned me = threadIdx.x, warp = me / 32, lanes = threads_ - warp * 32;
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask >> me % 32 & 1) || from >= 32 || !(mask >> from & 1)) {
      emulated_abort("a shuffle with a lane that its mask lacks");
    }
    const unsigned place = meetings_[1 + warp].number % 2;
    memcpy(&fibers_[me].values[place], &value, sizeof(T));
    meet(1 + warp, mask, static_cast<unsigned>(__builtin_popcount(mask)));
    memcpy(&value, &fibers_[warp * 32 + from].values[place], sizeof(T));
    return value;
  }

  void resume(unsigned thread, bool start) {
    Fiber& fiber = fibers_[thread];
    if (start) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &EmulatedBlock::begin, 0);
    }
    threadIdx = dim3(thread, 0, 0);
    current_ = &fiber;
    swapcontext(&scheduler_, &fiber.context);
  }

  static void begin() {
    (*running_->body_)();
    running_->current_->done = running_->moved_ = true;
  }

  inline static EmulatedBlock* running_ = nullptr;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  unsigned threads_ = 0;
  std::vector<Meeting> meetings_;
  bool moved_ = false;  // whether a thread came to a meeting or its end in this turn
  Fiber* current_ = nullptr;
};

inline void __syncthreads() { EmulatedBlock::wait(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return EmulatedBlock::exchange(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(lane_mask));
}

template <typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument),
                               const Argument& argument) {
  emulated_launch_device = emulated_device;
  ++emulated_launches;
  emulated_uploaded += emulated_upload(argument, 0);
  const unsigned blocks = config->gridDim.x;
  static EmulatedBlock emulated;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = emulated_backwards ? blocks - 1 - i : i;
    if (blocks > 1 && (block < emulated_first_block || block >= emulated_end_block)) continue;
    blockIdx = dim3(block, 0, 0);
    emulated.run(config->blockDim.x, [&] { kernel(argument); });
  }
  return cudaSuccess;
}
