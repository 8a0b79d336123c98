// The loops over elements in formats for low memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/segment.h"
#include "cpu/formats_lanes.h"
#include "cpu/update_lanes.h"

namespace radam {
namespace {

// The streams of a set with formats for low memory, and the codecs around its update.
template <DType kParam, DType kGrad, DType kState>
struct LowMemoryStreams {
  static constexpr int64_t kStride = 2 * kWidth<float>;  // elements at once
  static constexpr int64_t kParamSize = kDTypeSizes[kParam], kGradSize = kDTypeSizes[kGrad],
                           kStateSize = kDTypeSizes[kState];
  static constexpr int64_t kRemainderSize = kParam == kMaster32 ? 2 : kParam == kMaster24 ? 1 : 0;
  static constexpr bool kRandom = kState == kBlock8 || kState == kBFloat16Stochastic ||
                                  kParam == kBFloat16Stochastic || kParam == kMaster24;
  // Streams of 32 bits are zipped on their way where the moments are narrow.
  static constexpr Order kOrder = kState == kFloat32 ? kInOrder : kZipped;
  using Random = RandomWords<kOrder>;

  // The current position in each stream.
  struct Place {
    char* p;
    char* remainder;
    const char* g;
    char* m;
    char* v;

    RADAM_INLINE Place operator+(int64_t elements) const {
      return {p + elements * kParamSize, remainder + elements * kRemainderSize,
              g + elements * kGradSize, m + elements * kStateSize, v + elements * kStateSize};
    }
  };

  // Copies of up to kCount elements, padded with zeros.
  template <int64_t kCount>
  struct Buffers {
    char p[kCount * kParamSize] = {}, remainder[kCount * kRemainderSize + 1] = {},
                    g[kCount * kGradSize] = {}, m[kCount * kStateSize] = {},
                    v[kCount * kStateSize] = {};

    Buffers(const Place& at, int64_t numel) {
      memcpy(p, at.p, numel * kParamSize);
      if (kRemainderSize) memcpy(remainder, at.remainder, numel * kRemainderSize);
      memcpy(g, at.g, numel * kGradSize);
      memcpy(m, at.m, numel * kStateSize);
      memcpy(v, at.v, numel * kStateSize);
    }

    Place place() { return {p, remainder, g, m, v}; }

    // Copies elements [begin, end) back.
    void store(const Place& at, int64_t begin, int64_t end) {
      const Place from = place() + begin, to = at + begin;
      const int64_t numel = end - begin;
      memcpy(to.p, from.p, numel * kParamSize);
      if (kRemainderSize) memcpy(to.remainder, from.remainder, numel * kRemainderSize);
      memcpy(to.m, from.m, numel * kStateSize);
      memcpy(to.v, from.v, numel * kStateSize);
    }
  };

  static RADAM_INLINE Place place(const Segment& segment, const LowMemory& extra,
                                  const void* grad) {
    return {static_cast<char*>(segment.param), static_cast<char*>(extra.remainder),
            static_cast<const char*>(grad), static_cast<char*>(segment.exp_avg),
            static_cast<char*>(segment.exp_avg_sq)};
  }

  // How many elements from `index` on have the upper half of their index in common.
  static RADAM_INLINE int64_t same_upper_half(uint64_t index) {
    return kRandom ? (int64_t{1} << 32) - static_cast<uint32_t>(index) : INT64_MAX;
  }

  static RADAM_INLINE Random random(const StepScalars& scalars, uint64_t parameter,
                                    uint64_t index) {
    const Key key =
        kRandom ? element_key(scalars, parameter, static_cast<uint32_t>(index >> 32)) : Key{};
    return Random(key, static_cast<uint32_t>(index));
  }

  // Updates a pair of m and v, and the weights and gradients of a place. Returns random words for
  // the moments.
  static RADAM_INLINE WordPair update(const Place& at, Pair<float>& m, Pair<float>& v,
                                      Random& random, const UpdateArgs<float>& args) {
    // Load everything before the first store: g may alias p. Nothing else overlaps.
    Pair<float> p = load_weight<kParam, kOrder>(at.p, at.remainder);
    const Pair<float> g = load_plain<kGrad, kOrder>(at.g);
    radam_update(p.a, g.a, m.a, v.a, args.scalars, args.l2, args.action);
    radam_update(p.b, g.b, m.b, v.b, args.scalars, args.l2, args.action);
    WordPair words = {};
    if (kRandom) words = random.next();
    if (args.action != kHold) store_weight<kParam, kOrder>(p, words, at.p, at.remainder);
    return words;
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

// The loop over elements of a set with formats for low memory, but for block8.
template <DType kParam, DType kGrad, DType kState>
struct LowMemoryLoop {
  using S = LowMemoryStreams<kParam, kGrad, kState>;
  using Place = typename S::Place;
  static constexpr int64_t kStride = S::kStride;

  // Steps elements [begin, end) of a segment.
  static void run(const Segment& segment, const LowMemory& extra, const void* grad, int64_t begin,
                  int64_t end, const StepScalars& scalars, const UpdateArgs<float>& args) {
    const Place all = S::place(segment, extra, grad);
    while (begin < end) {
      const uint64_t index = extra.first_index + static_cast<uint64_t>(begin);
      const int64_t same = S::same_upper_half(index), left = end - begin;
      const int64_t numel = same < left ? same : left;
      run(all + begin, numel, S::random(scalars, extra.key, index), args);
      begin += numel;
    }
  }

  static __attribute__((noinline)) void run(Place at, int64_t left, typename S::Random random,
                                            const UpdateArgs<float>& given) {
    const UpdateArgs<float> args = given;  // a local copy, which no store can alias
    for (; left >= kStride; left -= kStride) {
      S::template prefetch<kStride>(at);
      step(at, random, args);
      at = at + kStride;
    }
    if (left) {
      typename S::template Buffers<kStride> rest(at, left);
      step(rest.place(), random, args);
      rest.store(at, 0, left);
    }
  }

  static RADAM_INLINE void step(const Place& at, typename S::Random& random,
                                const UpdateArgs<float>& args) {
    Pair<float> m = load_plain<weight_dtype(kState), S::kOrder>(at.m);
    Pair<float> v = load_plain<weight_dtype(kState), S::kOrder>(at.v);
    const WordPair words = S::update(at, m, v, random, args);
    if constexpr (kState == kBFloat16Stochastic) {
      store_stochastically<kExpAvgMoment>(m, words, at.m);
      store_stochastically<kExpAvgSqMoment>(v, words, at.v);
    } else {
      store_plain<kState, S::kOrder>(m, at.m);
      store_plain<kState, S::kOrder>(v, at.v);
    }
  }
};

// The loop over blocks of block8.
template <DType kParam, DType kGrad>
struct LowMemoryLoop<kParam, kGrad, kBlock8> {
  using S = LowMemoryStreams<kParam, kGrad, kBlock8>;
  using Place = typename S::Place;
  static constexpr int64_t kStride = S::kStride;

  // Steps elements [begin, end) of a segment. `begin` is a multiple of kBlock.
  static void run(const Segment& segment, const LowMemory& extra, const void* grad, int64_t begin,
                  int64_t end, const StepScalars& scalars, const UpdateArgs<float>& args) {
    const Place all = S::place(segment, extra, grad);
    const auto exponents = [&](void* of) { return static_cast<uint8_t*>(of) + begin / kBlock; };
    while (begin < end) {
      uint8_t* const m_exponents = exponents(extra.exp_avg_exponent);
      uint8_t* const v_exponents = exponents(extra.exp_avg_sq_exponent);
      const uint64_t index = extra.first_index + static_cast<uint64_t>(begin);
      const int64_t same = S::same_upper_half(index), left = end - begin;
      const int64_t blocks = (same < left ? same : left) / kBlock;
      const auto random = S::random(scalars, extra.key, index);
      if (blocks) {
        step(all + begin, m_exponents, v_exponents, blocks, random, args);
        begin += blocks * kBlock;
        continue;
      }
      // A short block, or one whose elements have two keys: stepped with each, in copies, whose
      // exponents are alike. Where there are zeros behind its end, moments remain zeros, or become
      // NaN as all of the block's do.
      const int64_t numel = left < kBlock ? left : kBlock, first = same < numel ? same : numel;
      using Buffers = typename S::template Buffers<kBlock>;
      const uint8_t m_exponent = *m_exponents, v_exponent = *v_exponents;
      const Buffers before(all + begin, numel);
      for (int64_t from = 0, to = first; from < numel; from = to, to = numel) {
        Buffers copy = before;
        *m_exponents = m_exponent;
        *v_exponents = v_exponent;
        const auto words = S::random(scalars, extra.key, index + static_cast<uint64_t>(from));
        step(copy.place(), m_exponents, v_exponents, 1, words.behind(from), args);
        copy.store(all + begin, from, to);
      }
      begin += numel;
    }
  }

  // Steps whole blocks.
  static __attribute__((noinline)) void step(Place at, uint8_t* m_exponents, uint8_t* v_exponents,
                                             int64_t blocks, typename S::Random random,
                                             const UpdateArgs<float>& given) {
    const UpdateArgs<float> args = given;  // a local copy, which no store can alias
    for (; blocks; --blocks, ++m_exponents, ++v_exponents) {
      S::template prefetch<kBlock>(at);
      const BlockDecoder<kExpAvgMoment> m_decoder(*m_exponents);
      const BlockDecoder<kExpAvgSqMoment> v_decoder(*v_exponents);
      BlockEncoder<kExpAvgMoment> m_encoder;
      BlockEncoder<kExpAvgSqMoment> v_encoder;
      uint16_t m_rounded[kBlock], v_rounded[kBlock];
      for (int i = 0; i < kBlock; i += kStride) {
        const Place here = at + i;
        Pair<float> m = m_decoder.load(here.m), v = v_decoder.load(here.v);
        const WordPair words = S::update(here, m, v, random, args);
        write(m_encoder.round(m, words), m_rounded + i);
        write(v_encoder.round(v, words), v_rounded + i);
      }
      const uint32_t m_exponent = m_encoder.exponent(), v_exponent = v_encoder.exponent();
      m_encoder.store(m_rounded, m_exponent, at.m);
      v_encoder.store(v_rounded, v_exponent, at.v);
      *m_exponents = static_cast<uint8_t>(m_exponent);
      *v_exponents = static_cast<uint8_t>(v_exponent);
      at = at + kBlock;
    }
  }
};

}  // namespace
}  // namespace radam
