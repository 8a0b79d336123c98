// The CPU kernel: one thread's range of elements. Compiled once for each instruction set, under the
// name in RADAM_ISA; nothing here may be shared between those objects, so all of it has internal
// linkage.
#include "step_cpu.h"

#include <cstdint>

#define RADAM_CONCAT_(a, b) a##b
#define RADAM_CONCAT(a, b) RADAM_CONCAT_(a, b)

namespace radam {
namespace {

// 16-bit streams pass through tiles of this many elements, which stay in the first-level cache.
constexpr int64_t kTile = 512;

template <typename T, bool kL2, Action kAction>
void update(T* p, const T* g, T* m, T* v, int64_t n, const Scalars<T>& s) {
  // No element depends on another: g may be p itself, and nothing else overlaps.
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    radam_update(p[i], g[i], m[i], v[i], s, kL2, kAction);
  }
}

template <typename T>
void update(T* p, const T* g, T* m, T* v, int64_t n, const Scalars<T>& s, Action action) {
  const bool l2 = s.weight_decay != 0;
  switch (action) {
    case kSkip:
      return;
    case kHold:
      return l2 ? update<T, true, kHold>(p, g, m, v, n, s)
                : update<T, false, kHold>(p, g, m, v, n, s);
    case kMomentum:
      return l2 ? update<T, true, kMomentum>(p, g, m, v, n, s)
                : update<T, false, kMomentum>(p, g, m, v, n, s);
    case kRectified:
      return l2 ? update<T, true, kRectified>(p, g, m, v, n, s)
                : update<T, false, kRectified>(p, g, m, v, n, s);
  }
}

template <typename From>
void widen_tile(const void* data, int64_t begin, int64_t n, float* tile) {
  const From* from = static_cast<const From*>(data) + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) tile[i] = widen(from[i]);
}

template <typename To>
void narrow_tile(const float* tile, int64_t begin, int64_t n, void* data) {
  To* to = static_cast<To*>(data) + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(tile[i]);
}

// Where n elements from `begin` can be read as float: in place, or widened into the tile.
float* open(DType dtype, void* data, int64_t begin, int64_t n, float* tile) {
  if (dtype == kFloat32) return static_cast<float*>(data) + begin;
  if (dtype == kBFloat16) {
    widen_tile<bfloat16>(data, begin, n, tile);
  } else {
    widen_tile<float16>(data, begin, n, tile);
  }
  return tile;
}

// Puts back what open() widened.
void close(DType dtype, void* data, int64_t begin, int64_t n, const float* tile) {
  if (dtype == kBFloat16) narrow_tile<bfloat16>(tile, begin, n, data);
  if (dtype == kFloat16) narrow_tile<float16>(tile, begin, n, data);
}

// Steps elements [begin, end) of a segment, computing in T.
template <typename T>
void step_range(const Segment& segment, const DTypeSet& dtypes, int64_t begin, int64_t end,
                const Scalars<T>& s, Action action);

// Where all four streams hold T already.
template <typename T>
void step_in_place(const Segment& segment, int64_t begin, int64_t end, const Scalars<T>& s,
                   Action action) {
  update(static_cast<T*>(segment.param) + begin, static_cast<const T*>(segment.grad) + begin,
         static_cast<T*>(segment.exp_avg) + begin, static_cast<T*>(segment.exp_avg_sq) + begin,
         end - begin, s, action);
}

template <>
void step_range(const Segment& segment, const DTypeSet&, int64_t begin, int64_t end,
                const Scalars<double>& s, Action action) {
  step_in_place(segment, begin, end, s, action);
}

template <>
void step_range(const Segment& segment, const DTypeSet& dtypes, int64_t begin, int64_t end,
                const Scalars<float>& s, Action action) {
  const bool in_place =
      dtypes.param == kFloat32 && dtypes.grad == kFloat32 && dtypes.state == kFloat32;
  if (in_place) {
    return step_in_place(segment, begin, end, s, action);
  }
  alignas(64) float tiles[4][kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    float* p = open(dtypes.param, segment.param, at, n, tiles[0]);
    // open() only reads; the gradient is never written.
    const float* g = open(dtypes.grad, const_cast<void*>(segment.grad), at, n, tiles[1]);
    float* m = open(dtypes.state, segment.exp_avg, at, n, tiles[2]);
    float* v = open(dtypes.state, segment.exp_avg_sq, at, n, tiles[3]);
    update(p, g, m, v, n, s, action);
    if (action != kHold) close(dtypes.param, segment.param, at, n, p);
    close(dtypes.state, segment.exp_avg, at, n, m);
    close(dtypes.state, segment.exp_avg_sq, at, n, v);
  }
}

// Asks for the start of a segment while the one before it is stepped: a short segment is over
// before the processor's own prefetchers see it coming.
void prefetch(const Segment& segment) {
  const void* const streams[] = {segment.param, segment.grad, segment.exp_avg, segment.exp_avg_sq};
  for (const void* stream : streams) {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(static_cast<const char*>(stream) + 64 * line);
    }
  }
}

template <typename T>
void step_segments(const Segment* segments, int64_t count, const DTypeSet& dtypes,
                   const StepScalars* scalars, int64_t first, int64_t last) {
  int64_t row = 0, offset = 0;  // the segment's elements begin at this one of all
  Scalars<T> s(scalars[row]);
  for (int64_t i = 0; i < count && offset < last; offset += segments[i++].numel) {
    const Segment& segment = segments[i];
    const int64_t begin = first > offset ? first - offset : 0;
    const int64_t end = last - offset < segment.numel ? last - offset : segment.numel;
    if (begin >= end) continue;
    if (i + 1 < count) prefetch(segments[i + 1]);
    if (segment.scalars != row) s = Scalars<T>(scalars[row = segment.scalars]);
    const Action action = static_cast<Action>(static_cast<int>(scalars[row].action));
    if (action != kSkip) step_range<T>(segment, dtypes, begin, end, s, action);
  }
}

}  // namespace

void RADAM_CONCAT(step_range_, RADAM_ISA)(const Segment* segments, int64_t count,
                                          const DTypeSet& dtypes, const StepScalars* scalars,
                                          int64_t first, int64_t last) {
  if (count == 0) return;
  if (dtypes.param == kFloat64) {
    step_segments<double>(segments, count, dtypes, scalars, first, last);
  } else {
    step_segments<float>(segments, count, dtypes, scalars, first, last);
  }
}

}  // namespace radam
