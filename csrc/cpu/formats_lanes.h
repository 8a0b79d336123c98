// The codecs of core/formats.h on vectors. Where elements are Zipped, the halves of a word belong
// to neighbours, and what needs 16 bits of an element is computed for two in one operation.
#pragma once

#include "core/formats.h"
#include "cpu/lanes.h"

namespace radam {
namespace {

using Ints = Vector<int32_t>::type;
using HalfBytes = Vector<uint8_t, kVectorBytes / 2>::type;  // as many elements as Halves
using QuarterBytes = Vector<int8_t, kVectorBytes / 4>::type;

RADAM_INLINE Halves halves(uint32_t each) { return Halves{} + static_cast<uint16_t>(each); }

RADAM_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }

RADAM_INLINE uint32_t largest(Ints x) {
#if RADAM_VECTOR_BYTES == 64
  return static_cast<uint32_t>(_mm512_reduce_max_epi32((__m512i)x));
#elif defined(__aarch64__)
  return static_cast<uint32_t>(vmaxvq_s32((int32x4_t)x));
#else
  int32_t most = x[0];
  for (int k = 1; k < kWidth<float>; ++k) most = x[k] > most ? x[k] : most;
  return static_cast<uint32_t>(most);
#endif
}

RADAM_INLINE WordPair unzip(Halves x) { return {(Words)x << 16, (Words)x & 0xffff0000u}; }

RADAM_INLINE Halves read_bytes(const void* from) {
#if RADAM_VECTOR_BYTES == 64
  return (Halves)_mm512_cvtepu8_epi16(read<__m256i>(from));
#elif RADAM_VECTOR_BYTES == 32
  return (Halves)_mm256_cvtepu8_epi16(read<__m128i>(from));
#elif defined(__aarch64__)
  return (Halves)vmovl_u8(read<uint8x8_t>(from));
#else
  return __builtin_convertvector(read<HalfBytes>(from), Halves);
#endif
}

// Stores halves that are less than 256.
RADAM_INLINE void write_bytes(Halves x, void* to) {
#if RADAM_VECTOR_BYTES == 64
  write(_mm512_cvtepi16_epi8((__m512i)x), to);
#elif RADAM_VECTOR_BYTES == 32
  const __m128i upper = _mm256_extracti128_si256((__m256i)x, 1);
  write(_mm_packus_epi16(_mm256_castsi256_si128((__m256i)x), upper), to);
#else
  write(__builtin_convertvector(x, HalfBytes), to);
#endif
}

// max(a - b, 0)
RADAM_INLINE Halves subtract_saturated(Halves a, Halves b) {
#if RADAM_VECTOR_BYTES == 64
  return (Halves)_mm512_subs_epu16((__m512i)a, (__m512i)b);
#elif RADAM_VECTOR_BYTES == 32
  return (Halves)_mm256_subs_epu16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  return (Halves)vqsubq_u16((uint16x8_t)a, (uint16x8_t)b);
#else
  return (a > b ? a : b) - b;
#endif
}

// Between pairs in order and zipped ones, for streams of 32 bits.
RADAM_INLINE Pair<float> zipped(const Pair<float>& x) {
#if RADAM_VECTOR_BYTES == 64
  const __m512 a = (__m512)x.a.v, b = (__m512)x.b.v;
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {(Floats)_mm512_permutex2var_ps(a, even, b), (Floats)_mm512_permutex2var_ps(a, odd, b)};
#elif RADAM_VECTOR_BYTES == 32
  const auto in_lanes = [](__m256 y) { return (Floats)_mm256_permute4x64_pd((__m256d)y, 0xd8); };
  const __m256 a = (__m256)x.a.v, b = (__m256)x.b.v;
  return {in_lanes(_mm256_shuffle_ps(a, b, 0x88)), in_lanes(_mm256_shuffle_ps(a, b, 0xdd))};
#elif defined(__aarch64__)
  const float32x4_t a = (float32x4_t)x.a.v, b = (float32x4_t)x.b.v;
  return {(Floats)vuzp1q_f32(a, b), (Floats)vuzp2q_f32(a, b)};
#else
  constexpr int kHalf = kWidth<float> / 2;
  Floats even = x.a.v, odd = x.b.v;
  for (int k = 0; k < kHalf; ++k) {
    even[k] = x.a.v[2 * k];
    odd[k] = x.a.v[2 * k + 1];
    even[kHalf + k] = x.b.v[2 * k];
    odd[kHalf + k] = x.b.v[2 * k + 1];
  }
  return {even, odd};
#endif
}

RADAM_INLINE Pair<float> in_order(const Pair<float>& x) {
#if RADAM_VECTOR_BYTES == 64
  const __m512 even = (__m512)x.a.v, odd = (__m512)x.b.v;
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(8));
  return {(Floats)_mm512_permutex2var_ps(even, low, odd),
          (Floats)_mm512_permutex2var_ps(even, high, odd)};
#elif RADAM_VECTOR_BYTES == 32
  const __m256 low = _mm256_unpacklo_ps((__m256)x.a.v, (__m256)x.b.v);
  const __m256 high = _mm256_unpackhi_ps((__m256)x.a.v, (__m256)x.b.v);
  return {(Floats)_mm256_permute2f128_ps(low, high, 0x20),
          (Floats)_mm256_permute2f128_ps(low, high, 0x31)};
#elif defined(__aarch64__)
  const float32x4_t even = (float32x4_t)x.a.v, odd = (float32x4_t)x.b.v;
  return {(Floats)vzip1q_f32(even, odd), (Floats)vzip2q_f32(even, odd)};
#else
  constexpr int kHalf = kWidth<float> / 2;
  Floats a = x.a.v, b = x.b.v;
  for (int k = 0; k < kHalf; ++k) {
    a[2 * k] = x.a.v[k];
    a[2 * k + 1] = x.b.v[k];
    b[2 * k] = x.a.v[kHalf + k];
    b[2 * k + 1] = x.b.v[kHalf + k];
  }
  return {a, b};
#endif
}

// The random words of consecutive elements.
template <Order kOrder>
class RandomWords {
 public:
  // `index` is the lower half of that of the first element. All have the same upper half.
  RADAM_INLINE RandomWords(const Key& key, uint32_t index) : high_(Words{} + key.high) {
    for (int k = 0; k < kWidth<float>; ++k) {
      next_[k] = static_cast<uint32_t>(kOrder == kZipped ? 2 * k : k) * kFactor;
    }
    next_ += index * kFactor + key.low;
  }

  // Those of `elements` before.
  RADAM_INLINE RandomWords behind(int64_t elements) const {
    RandomWords words = *this;
    words.next_ -= static_cast<uint32_t>(elements) * kFactor;
    return words;
  }

  // Those of a pair, and goes on to the next.
  RADAM_INLINE WordPair next() {
    const WordPair words = {mix(next_),
                            mix(next_ + (kOrder == kZipped ? 1 : kWidth<float>)*kFactor)};
    next_ += 2 * kWidth<float> * kFactor;
    return words;
  }

 private:
  static constexpr uint32_t kFactor = 0x9E3779B1u;  // as in random_word()

  RADAM_INLINE Words mix(Words x) const {  // mix32()
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= (x >> 15) ^ high_;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  Words next_{}, high_;
};

template <DType kDType, Order kOrder>
RADAM_INLINE Pair<float> load_plain(const void* from) {
  if constexpr (kDType == kBFloat16) {
    return load_bfloat16<kOrder>(from);
  } else {
    const Pair<float> x = load<float, kDType, kInOrder>(from);
    return kOrder == kZipped ? zipped(x) : x;
  }
}

template <DType kDType, Order kOrder>
RADAM_INLINE void store_plain(const Pair<float>& x, void* to) {
  if constexpr (kDType == kBFloat16) {
    static_assert(kOrder == kZipped, "no set needs another order");
    write(round_bfloat16<kZipped>(canonical(x)), to);
  } else {
    store<kDType, kInOrder>(kOrder == kZipped ? in_order(x) : x, to);
  }
}

// Weights.

template <Order kOrder>
RADAM_INLINE WordPair load_remainder8(const void* from) {
  if constexpr (kOrder == kZipped) {
    const WordPair upper = unzip(read_bytes(from) << 8);
    return {(Words)((Ints)upper.a >> 16), (Words)((Ints)upper.b >> 16)};
  } else {
#if defined(__aarch64__)
    const int16x8_t upper = (int16x8_t)(read_bytes(from) << 8);
    return {(Words)vmovl_s16(vget_low_s16(upper)), (Words)vmovl_high_s16(upper)};
#else
    const auto extended = [&](int index) {
#if RADAM_VECTOR_BYTES == 32
      return (Words)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<int64_t>(from, index))) << 8;
#else
      return (Words) __builtin_convertvector(read<QuarterBytes>(from, index), Ints) << 8;
#endif
    };
    return {extended(0), extended(1)};
#endif
  }
}

template <Order kOrder>
RADAM_INLINE WordPair load_remainder16(const void* from) {
  const WordPair upper = bits_of(load_bfloat16<kOrder>(from));
  return {(Words)((Ints)upper.a >> 16), (Words)((Ints)upper.b >> 16)};
}

// Together the bits are NaN only if the weight is, or if the remainder is stale.
RADAM_INLINE Pair<float> join(const Pair<float>& weight, const WordPair& remainder) {
  const WordPair u = bits_of(weight);
  const Pair<float> joined = floats_of({u.a + remainder.a, u.b + remainder.b});
  const auto one = [](Floats x, Floats rest) { return x == x ? x : rest; };
  if (!may_have_nan(joined)) return joined;
  return {one(joined.a.v, weight.a.v), one(joined.b.v, weight.b.v)};
}

template <DType kParam, Order kOrder>
RADAM_INLINE Pair<float> load_weight(const void* from, const void* remainder) {
  if constexpr (has_remainder(kParam)) {
    const Pair<float> weight = load_bfloat16<kOrder>(from);
    const WordPair rest = kParam == kMaster24 ? load_remainder8<kOrder>(remainder)
                                              : load_remainder16<kOrder>(remainder);
    return join(weight, rest);
  } else {
    return load_plain<weight_dtype(kParam), kOrder>(from);
  }
}

RADAM_INLINE Words random16(Words word) { return ((word ^ (word >> 15)) * 0x2C1B3C6Du) >> 16; }

template <DType kParam, Order kOrder>
RADAM_INLINE void store_weight(const Pair<float>& x, const WordPair& words, void* to,
                               void* remainder) {
  if constexpr (kParam == kBFloat16Stochastic) {
    const WordPair u = canonical(x);
    write(upper_halves<kOrder>({u.a + random16(words.a), u.b + random16(words.b)}), to);
  } else if constexpr (has_remainder(kParam)) {
    WordPair u = canonical(x);
    if (kParam == kMaster24) u = {u.a + (words.a & 0xffu), u.b + (words.b & 0xffu)};
    write(upper_halves<kOrder>({u.a + 0x8000u, u.b + 0x8000u}), to);
    const Halves rest = lower_halves<kOrder>(u);
    if constexpr (kParam == kMaster24) {
      write_bytes(rest >> 8, remainder);
    } else {
      write(rest, remainder);
    }
  } else {
    store_plain<kParam, kOrder>(x, to);
  }
}

// Moments. Where they are stochastically rounded, elements are Zipped.

template <Moment kMoment>
RADAM_INLINE Words random_moment(Words word) {
  return kMoment == kExpAvgMoment ? (word & 0xff00u) | 0x80u : word >> 16;
}

template <Moment kMoment>
RADAM_INLINE void store_stochastically(const Pair<float>& x, const WordPair& words, void* to) {
  const WordPair u = canonical(x);
  write(upper_halves<kZipped>(
            {u.a + random_moment<kMoment>(words.a), u.b + random_moment<kMoment>(words.b)}),
        to);
}

// Decodes elements of a block of block8.
template <Moment kMoment>
class BlockDecoder {
 public:
  explicit RADAM_INLINE BlockDecoder(uint32_t exponent)
      : offset_(halves((exponent - kExponentSpan<kMoment>) << 7)),
        nan_(halves(exponent == 255 ? 0x7fc0 : 0)) {}

  RADAM_INLINE Pair<float> load(const void* codes) const {
    const Halves code = read_bytes(codes);
    const Halves top = kMoment == kExpAvgMoment ? code & 0x7f : code;
    Halves upper = (((top << 4) + offset_) & ~(Halves)(top == 0)) | nan_;
    if (kMoment == kExpAvgMoment) upper |= (code & 0x80) << 8;
    return floats_of(unzip(upper));
  }

 private:
  Halves offset_, nan_;
};

// Encodes a block of block8: rounds all elements, then knows the exponent, then makes the codes.
template <Moment kMoment>
class BlockEncoder {
 public:
  // Rounds a pair of the block, for store().
  RADAM_INLINE Halves round(const Pair<float>& x, const WordPair& words) {
    const WordPair u = bits_of(x);
    return upper_halves<kZipped>({round(u.a, words.a), round(u.b, words.b)});
  }

  RADAM_INLINE uint32_t exponent() const { return block_exponent<kMoment>(largest(most_)); }

  static RADAM_INLINE void store(const uint16_t* rounded, uint32_t exponent, char* codes) {
    const Halves base = halves(static_cast<uint32_t>(block_base<kMoment>(exponent)));
    for (int i = 0; i < kBlock; i += 2 * kWidth<float>) {
      write_bytes(code(read<Halves>(rounded + i), base), codes + i);
    }
  }

 private:
  // The rounded top of a float32, in the upper half. The sign of exp_avg is carried along; that of
  // a NaN may change. Of exp_avg_sq it is 0 if the element is, and otherwise not.
  RADAM_INLINE Words round(Words u, Words word) {
    const Words magnitude = u & 0x7fffffffu;
    most_ = larger(most_, (Ints)magnitude);
    const Words random = random_moment<kMoment>(word) << 4;
    if (kMoment == kExpAvgMoment) return u + random;
    return magnitude != 0 ? (magnitude + random) | 0x10000u : Words{};
  }

  static RADAM_INLINE Halves code(Halves rounded, Halves base) {
    if (kMoment == kExpAvgMoment) {
      return subtract_saturated((rounded & 0x7fff) >> 4, base) | ((rounded >> 8) & 0x80);
    }
    const Halves top = subtract_saturated(rounded >> 4, base), one = halves(1);
    const Halves least = rounded < one ? rounded : one;
    return top > least ? top : least;
  }

  Ints most_{};
};

}  // namespace
}  // namespace radam
