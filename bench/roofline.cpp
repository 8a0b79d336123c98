// What memory can do with the streams of a step, for bench/roofline.py: an in-place streaming loop
// in the place of the kernel.
// Compiled with csrc/cpu/launch_cpu.cpp and csrc/cpu/threads.cpp, so that elements are divided over
// the same threads in the same way as the optimizer's.
#include <algorithm>
#include <cstdint>

#include "cpu/step_cpu.h"

namespace {

// The gradient's bits under this mask are added to p, m and v: none, so that the loop can run on
// tensors in use without changing a value, or all, so that a test sees where it has been.
uint64_t mask = 0;

template <typename P, typename G, typename S>
void stream(const radam::Segment& segment, const void* grad, int64_t begin, int64_t end) {
  P* __restrict p = static_cast<P*>(segment.param) + begin;
  const G* __restrict g = static_cast<const G*>(grad) + begin;
  S* __restrict m = static_cast<S*>(segment.exp_avg) + begin;
  S* __restrict v = static_cast<S*>(segment.exp_avg_sq) + begin;
  const G bits = static_cast<G>(mask);
  const int64_t n = end - begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const G x = g[i] & bits;
    p[i] += x;
    m[i] += x;
    v[i] += x;
  }
}

}  // namespace

namespace radam {

// The launcher's only instruction set is this loop.
void step_range_baseline(const Segments& segments, const DTypeSet& dtypes, const StepScalars*,
                         int64_t first, int64_t last) {
  const int param = kDTypeSizes[dtypes.param], state = kDTypeSizes[dtypes.state];
  int64_t offset = 0;  // the segment's elements begin at this one of all
  for (int64_t i = 0; i < segments.count && offset < last; offset += segments.rows[i++].numel) {
    const Segment& segment = segments.rows[i];
    const int64_t begin = std::max<int64_t>(first - offset, 0);
    const int64_t end = std::min(last - offset, segment.numel);
    if (begin >= end) continue;
    const void* grad = segments.grads[i];
    if (param == 8) {
      stream<uint64_t, uint64_t, uint64_t>(segment, grad, begin, end);
    } else if (param == 4 && kDTypeSizes[dtypes.grad] == 4) {
      stream<uint32_t, uint32_t, uint32_t>(segment, grad, begin, end);
    } else if (param == 4) {
      stream<uint32_t, uint16_t, uint32_t>(segment, grad, begin, end);
    } else if (state == 4) {
      stream<uint16_t, uint16_t, uint32_t>(segment, grad, begin, end);
    } else {
      stream<uint16_t, uint16_t, uint16_t>(segment, grad, begin, end);
    }
  }
}

// The launcher asks for it, too, and nothing here calls it.
double partial_norm_baseline(const void*, int64_t, DType, Norm) { return 0; }

}  // namespace radam

extern "C" {

// Streams once through `count` segments. Dtypes are those of csrc/core/dtypes.h.
void radam_stream(const radam::Segment* segments, const void* const* grads, int64_t count,
                  int param, int grad, int state, int threads, uint64_t bits) {
  mask = bits;
  const radam::DTypeSet dtypes = {static_cast<radam::DType>(param), static_cast<radam::DType>(grad),
                                  static_cast<radam::DType>(state)};
  const radam::Segments all = {segments, grads, nullptr, count};
  radam::step_cpu(all, dtypes, nullptr, threads, radam::instruction_sets()[0]);
}
}
