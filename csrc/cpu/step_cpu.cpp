// The CPU kernel: one thread's range of elements. Compiled once for each instruction set, which
// RADAM_ISA names. The objects must not share code, so everything else here has internal linkage.
#include "cpu/step_cpu.h"

#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"
#include "cpu/low_memory_loop.h"
#include "cpu/update_lanes.h"

namespace radam {
namespace {

// The current position in each of the four streams, which need not be aligned.
struct Cursor {
  char* p;
  const char* g;
  char* m;
  char* v;
};

// The loop over elements of one set of dtypes. It branches on the action in every iteration: a
// branch that never changes direction is predicted, and costs almost nothing.
template <typename T, DType kParam, DType kGrad, DType kState>
struct Loop {
  static constexpr int64_t kStride = 2 * kWidth<T>;  // elements at once
  static constexpr int64_t kParamSize = kDTypeSizes[kParam], kGradSize = kDTypeSizes[kGrad],
                           kStateSize = kDTypeSizes[kState];
  static constexpr Order kOrder =
      kParam == kBFloat16 && kGrad == kBFloat16 && kState == kBFloat16 ? kZipped : kInOrder;

  // Steps elements [begin, end) of a segment.
  static void run(const Segment& segment, const void* grad, int64_t begin, int64_t end,
                  const UpdateArgs<T>& given) {
    const UpdateArgs<T> args = given;  // a local copy, which no store can alias
    Cursor at = {static_cast<char*>(segment.param) + begin * kParamSize,
                 static_cast<const char*>(grad) + begin * kGradSize,
                 static_cast<char*>(segment.exp_avg) + begin * kStateSize,
                 static_cast<char*>(segment.exp_avg_sq) + begin * kStateSize};
    int64_t left = end - begin;
    for (; left >= kStride; left -= kStride) {
      prefetch<kStride * kParamSize>(at.p);
      prefetch<kStride * kGradSize>(at.g);
      prefetch<kStride * kStateSize>(at.m);
      prefetch<kStride * kStateSize>(at.v);
      step(at, args);
      at.p += kStride * kParamSize;
      at.g += kStride * kGradSize;
      at.m += kStride * kStateSize;
      at.v += kStride * kStateSize;
    }
    if (left) step_rest(at, left, args);
  }

  static RADAM_INLINE void step(const Cursor& at, const UpdateArgs<T>& args) {
    // Load everything before the first store: g may alias p. Nothing else overlaps.
    Pair<T> p = load<T, kParam, kOrder>(at.p), m = load<T, kState, kOrder>(at.m),
            v = load<T, kState, kOrder>(at.v);
    const Pair<T> g = load<T, kGrad, kOrder>(at.g);
    radam_update(p.a, g.a, m.a, v.a, args.scalars, args.l2, args.action);
    radam_update(p.b, g.b, m.b, v.b, args.scalars, args.l2, args.action);
    store<kState, kOrder>(m, at.m);
    store<kState, kOrder>(v, at.v);
    if (args.action != kHold) store<kParam, kOrder>(p, at.p);
  }

  // Steps the tail, which is shorter than a stride, in buffers of one stride.
  static void step_rest(const Cursor& at, int64_t n, const UpdateArgs<T>& args) {
    char p[kStride * kParamSize] = {}, g[kStride * kGradSize] = {}, m[kStride * kStateSize] = {},
                     v[kStride * kStateSize] = {};
    memcpy(p, at.p, n * kParamSize);
    memcpy(g, at.g, n * kGradSize);
    memcpy(m, at.m, n * kStateSize);
    memcpy(v, at.v, n * kStateSize);
    step({p, g, m, v}, args);
    memcpy(at.p, p, n * kParamSize);
    memcpy(at.m, m, n * kStateSize);
    memcpy(at.v, v, n * kStateSize);
  }
};

// Prefetches the start of a segment while the previous one is stepped: a short segment ends before
// the hardware prefetchers recognize it.
void prefetch(const Segment& segment, const void* grad) {
  const void* const streams[] = {segment.param, grad, segment.exp_avg, segment.exp_avg_sq};
  for (const void* stream : streams) {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(static_cast<const char*>(stream) + kLine * line);
    }
  }
}

// The elements of all blocks that begin before `end`.
int64_t whole_blocks(int64_t end, int64_t numel) {
  const int64_t whole = (end + kBlock - 1) / kBlock * kBlock;
  return whole < numel ? whole : numel;
}

template <typename P, typename G, typename S>
void step_segments(const Segments& segments, const StepScalars* scalars, int64_t first,
                   int64_t last) {
  using T = typename P::Compute;
  constexpr DTypeSet kSet = {P::kDType, G::kDType, S::kDType};
  int64_t row = 0, offset = 0;  // offset: the elements of all segments before this one
  UpdateArgs<T> args(scalars[row]);
  for (int64_t i = 0; i < segments.count && offset < last; offset += segments.rows[i++].numel) {
    const Segment& segment = segments.rows[i];
    int64_t begin = first > offset ? first - offset : 0;
    int64_t end = last - offset < segment.numel ? last - offset : segment.numel;
    if (kSet.state == kBlock8) {  // whoever has the first element of a block steps all of it
      begin = whole_blocks(begin, segment.numel);
      end = whole_blocks(end, segment.numel);
    }
    if (begin >= end) continue;
    if (i + 1 < segments.count) prefetch(segments.rows[i + 1], segments.grads[i + 1]);
    if (segment.scalars != row) args = UpdateArgs<T>(scalars[row = segment.scalars]);
    if (args.action == kSkip) continue;
    if constexpr (is_low_memory(kSet)) {
      LowMemoryLoop<P::kDType, G::kDType, S::kDType>::run(
          segment, segments.low_memory[i], segments.grads[i], begin, end, scalars[row], args);
    } else {
      Loop<T, P::kDType, G::kDType, S::kDType>::run(segment, segments.grads[i], begin, end, args);
    }
  }
}

}  // namespace

void RADAM_CONCAT(step_range_, RADAM_ISA)(const Segments& segments, const DTypeSet& dtypes,
                                          const StepScalars* scalars, int64_t first, int64_t last) {
  if (segments.count == 0) return;
  visit_dtypes(dtypes, [&](auto p, auto g, auto s) {
    step_segments<decltype(p), decltype(g), decltype(s)>(segments, scalars, first, last);
  });
}

}  // namespace radam
