// The CPU kernel: one thread's range of elements. Compiled once for each instruction set, under the
// name in RADAM_ISA; nothing here may be shared between those objects, so all of it has internal
// linkage.
#include "step_cpu.h"

#include <cstdint>
#include <cstring>

#include "lanes.h"

#define RADAM_CONCAT_(a, b) a##b
#define RADAM_CONCAT(a, b) RADAM_CONCAT_(a, b)

namespace radam {
namespace {

constexpr int kLine = 64;    // bytes of a cache line
constexpr int kAhead = 512;  // bytes: the processor's prefetchers stop at the end of each page

// What all elements of a segment have in common.
template <typename T>
struct Rule {
  Scalars<Lanes<T>, Factor<T>> scalars;
  bool l2;
  Action action;

  explicit Rule(const StepScalars& s)
      : scalars(s),
        l2(static_cast<T>(s.weight_decay) != 0),
        action(static_cast<Action>(static_cast<int>(s.action))) {}
};

// A place in each of the four streams. Their elements need not be aligned.
struct Place {
  char* p;
  const char* g;
  char* m;
  char* v;
};

// The loop over elements of one set of dtypes. Which update it is, is asked anew at each stride: a
// branch that always goes the same way costs next to nothing.
template <typename T, DType kParam, DType kGrad, DType kState>
struct Loop {
  static constexpr int64_t kStride = 2 * kWidth<T>;  // elements at once
  static constexpr int64_t kParamSize = kDTypeSizes[kParam], kGradSize = kDTypeSizes[kGrad],
                           kStateSize = kDTypeSizes[kState];
  static constexpr Order kOrder =
      kParam == kBFloat16 && kGrad == kBFloat16 && kState == kBFloat16 ? kZipped : kInOrder;

  // Steps elements [begin, end) of a segment.
  static void run(const Segment& segment, int64_t begin, int64_t end, const Rule<T>& given) {
    const Rule<T> rule = given;  // where no store can reach it, for all the compiler knows
    Place at = {static_cast<char*>(segment.param) + begin * kParamSize,
                static_cast<const char*>(segment.grad) + begin * kGradSize,
                static_cast<char*>(segment.exp_avg) + begin * kStateSize,
                static_cast<char*>(segment.exp_avg_sq) + begin * kStateSize};
    int64_t left = end - begin;
    for (; left >= kStride; left -= kStride) {
      prefetch<kStride * kParamSize>(at.p);
      prefetch<kStride * kGradSize>(at.g);
      prefetch<kStride * kStateSize>(at.m);
      prefetch<kStride * kStateSize>(at.v);
      step(at, rule);
      at.p += kStride * kParamSize;
      at.g += kStride * kGradSize;
      at.m += kStride * kStateSize;
      at.v += kStride * kStateSize;
    }
    if (left) step_rest(at, left, rule);
  }

  static RADAM_INLINE void step(const Place& at, const Rule<T>& rule) {
    // All are loaded before the first is stored: g may be p itself, and nothing else overlaps.
    Pair<T> p = load<T, kParam, kOrder>(at.p), m = load<T, kState, kOrder>(at.m),
            v = load<T, kState, kOrder>(at.v);
    const Pair<T> g = load<T, kGrad, kOrder>(at.g);
    radam_update(p.a, g.a, m.a, v.a, rule.scalars, rule.l2, rule.action);
    radam_update(p.b, g.b, m.b, v.b, rule.scalars, rule.l2, rule.action);
    store<kState, kOrder>(m, at.m);
    store<kState, kOrder>(v, at.v);
    if (rule.action != kHold) store<kParam, kOrder>(p, at.p);
  }

  // Fewer elements than a stride: in copies that have room for one.
  static void step_rest(const Place& at, int64_t n, const Rule<T>& rule) {
    char p[kStride * kParamSize] = {}, g[kStride * kGradSize] = {}, m[kStride * kStateSize] = {},
                     v[kStride * kStateSize] = {};
    memcpy(p, at.p, n * kParamSize);
    memcpy(g, at.g, n * kGradSize);
    memcpy(m, at.m, n * kStateSize);
    memcpy(v, at.v, n * kStateSize);
    step({p, g, m, v}, rule);
    memcpy(at.p, p, n * kParamSize);
    memcpy(at.m, m, n * kStateSize);
    memcpy(at.v, v, n * kStateSize);
  }

  template <int kBytes>
  static RADAM_INLINE void prefetch(const char* at) {
    for (int i = 0; i < kBytes; i += kLine) __builtin_prefetch(at + kAhead + i);
  }
};

template <typename T>
using Run = void (*)(const Segment&, int64_t begin, int64_t end, const Rule<T>&);

template <DType kParam, DType kGrad>
Run<float> find_loop(DType state) {
  return state == kFloat32    ? Loop<float, kParam, kGrad, kFloat32>::run
         : state == kBFloat16 ? Loop<float, kParam, kGrad, kBFloat16>::run
                              : Loop<float, kParam, kGrad, kFloat16>::run;
}

template <DType kParam>
Run<float> find_loop(DType grad, DType state) {
  return grad == kFloat32    ? find_loop<kParam, kFloat32>(state)
         : grad == kBFloat16 ? find_loop<kParam, kBFloat16>(state)
                             : find_loop<kParam, kFloat16>(state);
}

template <typename T>
Run<T> find_loop(const DTypeSet& dtypes);
template <>
Run<float> find_loop(const DTypeSet& dtypes) {
  return dtypes.param == kFloat32    ? find_loop<kFloat32>(dtypes.grad, dtypes.state)
         : dtypes.param == kBFloat16 ? find_loop<kBFloat16>(dtypes.grad, dtypes.state)
                                     : find_loop<kFloat16>(dtypes.grad, dtypes.state);
}
template <>
Run<double> find_loop(const DTypeSet&) {
  return Loop<double, kFloat64, kFloat64, kFloat64>::run;
}

// Asks for the start of a segment while the one before it is stepped: a short segment is over
// before the processor's own prefetchers see it coming.
void prefetch(const Segment& segment) {
  const void* const streams[] = {segment.param, segment.grad, segment.exp_avg, segment.exp_avg_sq};
  for (const void* stream : streams) {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(static_cast<const char*>(stream) + kLine * line);
    }
  }
}

template <typename T>
void step_segments(const Segment* segments, int64_t count, const DTypeSet& dtypes,
                   const StepScalars* scalars, int64_t first, int64_t last) {
  int64_t row = 0, offset = 0;  // the segment's elements begin at this one of all
  Rule<T> rule(scalars[row]);
  const Run<T> run = find_loop<T>(dtypes);
  for (int64_t i = 0; i < count && offset < last; offset += segments[i++].numel) {
    const Segment& segment = segments[i];
    const int64_t begin = first > offset ? first - offset : 0;
    const int64_t end = last - offset < segment.numel ? last - offset : segment.numel;
    if (begin >= end) continue;
    if (i + 1 < count) prefetch(segments[i + 1]);
    if (segment.scalars != row) rule = Rule<T>(scalars[row = segment.scalars]);
    if (rule.action != kSkip) run(segment, begin, end, rule);
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
