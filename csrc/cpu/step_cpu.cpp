// The CPU kernel: one thread's range of elements. Compiled once for each instruction set, which
// RADAM_ISA names. The objects must not share code, so everything else here has internal linkage.
#include "cpu/step_cpu.h"

#include <cstdint>
#include <cstring>

#include "core/update.h"
#include "cpu/formats_lanes.h"
#include "cpu/lanes.h"

namespace radam {
namespace {

constexpr int kLine = 64;    // bytes of a cache line
constexpr int kAhead = 512;  // bytes to prefetch ahead: hardware prefetch stops at each page's end

template <int kBytes>
RADAM_INLINE void prefetch(const char* at) {
  for (int i = 0; i < kBytes; i += kLine) __builtin_prefetch(at + kAhead + i);
}

// What is the same for all elements of a segment.
template <typename T>
struct UpdateArgs {
  Scalars<Lanes<T>, Factor<T>> scalars;
  bool l2;
  Action action;

  explicit UpdateArgs(const StepScalars& s)
      : scalars(s), l2(static_cast<T>(s.weight_decay) != 0), action(action_of(s)) {}
};

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

// The loop over elements of one set with formats for low memory.
template <DType kParam, DType kGrad, DType kState>
struct LowMemoryLoop {
  static constexpr int64_t kStride = 2 * kWidth<float>;
  static constexpr int64_t kParamSize = kDTypeSizes[kParam], kGradSize = kDTypeSizes[kGrad],
                           kStateSize = kDTypeSizes[kState],
                           kRemainderSize = kParam == kMaster32   ? 2
                                            : kParam == kMaster24 ? 1
                                                                  : 0;
  static constexpr bool kBlocks = kState == kBlock8;
  static constexpr bool kRandom = kBlocks || kState == kBFloat16Stochastic ||
                                  kParam == kBFloat16Stochastic || kParam == kMaster24;
  // Floats are zipped on their way if there are fewer of them than of 16 bits or 8.
  static constexpr Order kOrder = kState == kFloat32 ? kInOrder : kZipped;

  // The current position in each stream.
  struct Place {
    char* p;
    char* remainder;
    const char* g;
    char* m;
    char* v;

    RADAM_INLINE void operator+=(int64_t elements) {
      p += elements * kParamSize;
      remainder += elements * kRemainderSize;
      g += elements * kGradSize;
      m += elements * kStateSize;
      v += elements * kStateSize;
    }
  };

  // Both moments of the current block, where there are blocks.
  struct Blocks {
    Block<kExpAvgMoment> m;
    Block<kExpAvgSqMoment> v;
    int64_t begun = 0;  // elements
  };
  struct None {};
  using Moments = std::conditional_t<kBlocks, Blocks, None>;

  // Steps elements [begin, end) of a segment.
  static void run(const Segment& segment, const LowMemory& extra, const void* grad, int64_t begin,
                  int64_t end, const StepScalars& scalars, const UpdateArgs<float>& given) {
    const UpdateArgs<float> args = given;  // a local copy, which no store can alias
    Place at = {static_cast<char*>(segment.param), static_cast<char*>(extra.remainder),
                static_cast<const char*>(grad), static_cast<char*>(segment.exp_avg),
                static_cast<char*>(segment.exp_avg_sq)};
    at += begin;
    uint64_t index = extra.first_index + static_cast<uint64_t>(begin);
    if constexpr (kBlocks) {
      uint8_t* m_exponent = static_cast<uint8_t*>(extra.exp_avg_exponent) + begin / kBlock;
      uint8_t* v_exponent = static_cast<uint8_t*>(extra.exp_avg_sq_exponent) + begin / kBlock;
      for (; begin < end; begin += kBlock, index += kBlock, ++m_exponent, ++v_exponent) {
        const int64_t numel = end - begin < kBlock ? end - begin : kBlock;
        prefetch<kBlock>(at);
        char* const m = at.m;
        char* const v = at.v;
        Blocks blocks = {Block<kExpAvgMoment>(*m_exponent), Block<kExpAvgSqMoment>(*v_exponent)};
        run(at, numel, index, extra.key, scalars, args, blocks);
        blocks.m.store(m, m_exponent, numel);
        blocks.v.store(v, v_exponent, numel);
      }
    } else {
      None none;
      run(at, end - begin, index, extra.key, scalars, args, none);
    }
  }

  // Steps `left` elements, whose random words have several keys if their indices cross a multiple
  // of 2^32.
  static RADAM_INLINE void run(Place& at, int64_t left, uint64_t index, uint64_t parameter,
                               const StepScalars& scalars, const UpdateArgs<float>& args,
                               Moments& moments) {
    while (left > 0) {
      const uint32_t low = static_cast<uint32_t>(index);
      const int64_t same = (int64_t{1} << 32) - low;
      const int64_t numel = kRandom && same < left ? same : left;
      const Key key =
          kRandom ? element_key(scalars, parameter, static_cast<uint32_t>(index >> 32)) : Key{};
      run(at, numel, RandomWords<kOrder>(key, low), args, moments);
      index += static_cast<uint64_t>(numel);
      left -= numel;
    }
  }

  static RADAM_INLINE void run(Place& at, int64_t left, RandomWords<kOrder> words,
                               const UpdateArgs<float>& args, Moments& moments) {
    for (; left >= kStride; left -= kStride) {
      if (!kBlocks) prefetch<kStride>(at);
      step(at, kStride, words, args, moments);
      at += kStride;
    }
    if (left) {
      step_rest(at, left, words, args, moments);
      at += left;
    }
  }

  // Steps a stride, of which `numel` elements count.
  static RADAM_INLINE void step(const Place& at, int64_t numel, RandomWords<kOrder>& random,
                                const UpdateArgs<float>& args, Moments& moments) {
    // Load everything before the first store: g may alias p. Nothing else overlaps.
    Pair<float> p = load_weight<kParam, kOrder>(at.p, at.remainder), m = {{Floats{}}, {Floats{}}},
                v = m;
    if constexpr (kBlocks) {
      m = moments.m.load(at.m);
      v = moments.v.load(at.v);
    } else {
      m = load_plain<weight_dtype(kState), kOrder>(at.m);
      v = load_plain<weight_dtype(kState), kOrder>(at.v);
    }
    const Pair<float> g = load_plain<kGrad, kOrder>(at.g);
    radam_update(p.a, g.a, m.a, v.a, args.scalars, args.l2, args.action);
    radam_update(p.b, g.b, m.b, v.b, args.scalars, args.l2, args.action);
    WordPair words = {};
    if (kRandom) words = random.next();
    if (args.action != kHold) store_weight<kParam, kOrder>(p, words, at.p, at.remainder);
    if constexpr (kBlocks) {
      moments.m.round(only(m, numel), words, moments.begun);
      moments.v.round(only(v, numel), words, moments.begun);
      moments.begun += numel;
    } else if constexpr (kState == kBFloat16Stochastic) {
      store_stochastically<kExpAvgMoment>(m, words, at.m);
      store_stochastically<kExpAvgSqMoment>(v, words, at.v);
    } else {
      store_plain<kState, kOrder>(m, at.m);
      store_plain<kState, kOrder>(v, at.v);
    }
  }

  // Zeros instead of what is padding, which has no part in the exponent of a block.
  static RADAM_INLINE Pair<float> only(const Pair<float>& x, int64_t numel) {
    if (numel == kStride) return x;
    WordPair bits = bits_of(x);
    for (int k = 0; k < kWidth<float>; ++k) {
      if (2 * k >= numel) bits.a[k] = 0;
      if (2 * k + 1 >= numel) bits.b[k] = 0;
    }
    return floats_of(bits);
  }

  // Steps the tail, which is shorter than a stride, in buffers of one stride.
  static void step_rest(const Place& at, int64_t n, RandomWords<kOrder>& words,
                        const UpdateArgs<float>& args, Moments& moments) {
    char p[kStride * kParamSize] = {}, g[kStride * kGradSize] = {}, m[kStride * kStateSize] = {},
                     v[kStride * kStateSize] = {}, remainder[kStride * 2] = {};
    memcpy(p, at.p, n * kParamSize);
    memcpy(g, at.g, n * kGradSize);
    memcpy(m, at.m, n * kStateSize);
    memcpy(v, at.v, n * kStateSize);
    if (kRemainderSize) memcpy(remainder, at.remainder, n * kRemainderSize);
    step({p, remainder, g, m, v}, n, words, args, moments);
    memcpy(at.p, p, n * kParamSize);
    if (kRemainderSize) memcpy(at.remainder, remainder, n * kRemainderSize);
    if (kBlocks) return;
    memcpy(at.m, m, n * kStateSize);
    memcpy(at.v, v, n * kStateSize);
  }

  template <int64_t kElements>
  static RADAM_INLINE void prefetch(const Place& at) {
    radam::prefetch<kElements * kParamSize>(at.p);
    radam::prefetch<kElements * kRemainderSize>(at.remainder);
    radam::prefetch<kElements * kGradSize>(at.g);
    radam::prefetch<kElements * kStateSize>(at.m);
    radam::prefetch<kElements * kStateSize>(at.v);
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
