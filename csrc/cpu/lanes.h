// The SIMD vectors of the CPU kernel, as wide as the instruction set allows, and their loads and
// stores in every dtype. Arithmetic uses GCC's vector extension, which clang supports too.
// Conversions use intrinsics where compilers do not generate the best instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtypes.h"

#if defined(__AVX512BW__)
#define RADAM_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__F16C__)
#define RADAM_VECTOR_BYTES 32
#else
#define RADAM_VECTOR_BYTES 16
#endif

// For the names of functions, with RADAM_ISA.
#define RADAM_CONCAT_(a, b) a##b
#define RADAM_CONCAT(a, b) RADAM_CONCAT_(a, b)

// Every object file that includes this is compiled for a different instruction set. Internal
// linkage keeps the linker from sharing code between them.
namespace radam {
namespace {

constexpr int kVectorBytes = RADAM_VECTOR_BYTES;
template <typename T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <typename Element, int kBytes = kVectorBytes>
struct Vector {
  typedef Element type __attribute__((vector_size(kBytes)));
};
using Floats = Vector<float>::type;
using Words = Vector<uint32_t>::type;
using Halves = Vector<uint16_t>::type;  // as many elements as two vectors of float
using NarrowHalves = Vector<uint16_t, kVectorBytes / 2>::type;  // as many as one

// Loads vector number `index` of an array that need not be aligned.
template <typename V>
RADAM_INLINE V read(const void* from, int index = 0) {
  V vector;
  memcpy(&vector, static_cast<const char*>(from) + index * sizeof(V), sizeof(V));
  return vector;
}

template <typename V>
RADAM_INLINE void write(V vector, void* to, int index = 0) {
  memcpy(static_cast<char*>(to) + index * sizeof(V), &vector, sizeof(V));
}

template <typename T>
struct Lanes {
  using V = typename Vector<T>::type;
  V v;

  RADAM_INLINE Lanes(V vector) : v(vector) {}
  // Broadcasts x: x - 0, because 0 + x would lose the sign of -0.0. Any NaN becomes one that
  // round_bfloat16() keeps a NaN.
  RADAM_INLINE explicit Lanes(double x)
      : v((x == x ? static_cast<T>(x) : std::numeric_limits<T>::quiet_NaN()) - V{}) {}
};

template <typename T>
RADAM_INLINE Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  return a.v + b.v;
}
template <typename T>
RADAM_INLINE Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  return a.v - b.v;
}
template <typename T>
RADAM_INLINE Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  return a.v * b.v;
}
template <typename T>
RADAM_INLINE Lanes<T> operator/(Lanes<T> a, Lanes<T> b) {
  return a.v / b.v;
}
template <typename T>
RADAM_INLINE Lanes<T> sqrt(Lanes<T> x) {
  for (int k = 0; k < kWidth<T>; ++k) x.v[k] = std::sqrt(x.v[k]);  // compiles to one instruction
  return x;
}

// A factor that is usually 1. The multiplication is skipped then, which gives the same bits.
template <typename T>
struct Factor {
  Lanes<T> x;
  bool one;

  RADAM_INLINE Factor(Lanes<T> factor) : x(factor), one(factor.v[0] == 1) {}
};

template <typename T>
RADAM_INLINE Lanes<T> operator*(Lanes<T> a, const Factor<T>& factor) {
  return factor.one ? a : a * factor.x;
}

// Two vectors of elements that are updated together.
template <typename T>
struct Pair {
  Lanes<T> a, b;
};

// How a and b of a pair divide 16-bit elements: the first half and the second, or even and odd
// positions. Zipped elements are loaded and stored without a permutation of lanes, which is faster
// if all streams are 16-bit.
enum Order { kInOrder, kZipped };

// Two vectors of words, in the order of a Pair<float>.
struct WordPair {
  Words a, b;
};

RADAM_INLINE WordPair bits_of(const Pair<float>& x) { return {(Words)x.a.v, (Words)x.b.v}; }
RADAM_INLINE Pair<float> floats_of(const WordPair& x) { return {(Floats)x.a, (Floats)x.b}; }

// Interleaves 16-bit halves: even positions from `even`, odd positions from `odd`.
RADAM_INLINE Halves zip(Words even, Words odd) {
#if RADAM_VECTOR_BYTES == 32
  return (Halves)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  return (Halves)((even & 0xffffu) | (odd & 0xffff0000u));
#endif
}

// The upper halves of words, in the order of memory.
template <Order kOrder>
RADAM_INLINE Halves upper_halves(const WordPair& x) {
#if defined(__aarch64__)
  const uint16x8_t a = (uint16x8_t)x.a, b = (uint16x8_t)x.b;
  return (Halves)(kOrder == kZipped ? vtrn2q_u16(a, b) : vuzp2q_u16(a, b));
#else
  if constexpr (kOrder == kZipped) {
    return zip(x.a >> 16, x.b);
  } else {
#if RADAM_VECTOR_BYTES == 32
    const __m256i packed = _mm256_packus_epi32((__m256i)(x.a >> 16), (__m256i)(x.b >> 16));
    return (Halves)_mm256_permute4x64_epi64(packed, 0xd8);
#else
    Halves halves;
    write(__builtin_convertvector(x.a >> 16, NarrowHalves), &halves, 0);
    write(__builtin_convertvector(x.b >> 16, NarrowHalves), &halves, 1);
    return halves;
#endif
  }
#endif
}

template <Order kOrder>
RADAM_INLINE Halves lower_halves(const WordPair& x) {
#if defined(__aarch64__)
  const uint16x8_t a = (uint16x8_t)x.a, b = (uint16x8_t)x.b;
  return (Halves)(kOrder == kZipped ? vtrn1q_u16(a, b) : vuzp1q_u16(a, b));
#else
  if constexpr (kOrder == kZipped) {
    return zip(x.a, x.b << 16);
  } else {
    return upper_halves<kOrder>({x.a << 16, x.b << 16});
  }
#endif
}

// Loads 16-bit elements, each zero-extended to 32 bits.
RADAM_INLINE Words read_extended(const void* from, int index) {
#if RADAM_VECTOR_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32(read<__m128i>(from, index));
#else
  return __builtin_convertvector(read<NarrowHalves>(from, index), Words);
#endif
}

template <Order kOrder>
RADAM_INLINE Pair<float> load_bfloat16(const void* from) {
  if constexpr (kOrder == kZipped) {
    const Words both = read<Words>(from);
    return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
  } else {
#if defined(__aarch64__)
    const uint16x8_t zeros = {}, both = read<uint16x8_t>(from);
    return {(Floats)vzip1q_u16(zeros, both), (Floats)vzip2q_u16(zeros, both)};
#else
    return {(Floats)(read_extended(from, 0) << 16), (Floats)(read_extended(from, 1) << 16)};
#endif
  }
}

// Whether a select for NaNs is needed. A branch that is never taken costs less than a select does
// before AVX-512.
RADAM_INLINE bool may_have_nan(const Pair<float>& x) {
#if RADAM_VECTOR_BYTES == 32
  const __m256 unordered = _mm256_cmp_ps((__m256)x.a.v, (__m256)x.b.v, _CMP_UNORD_Q);
  return __builtin_expect(_mm256_movemask_ps(unordered), 0);
#else
  return static_cast<void>(x), true;
#endif
}

// NaN with no payload that rounding could carry out of.
RADAM_INLINE WordPair canonical(const Pair<float>& x) {
  const auto one = [](Floats y) { return y == y ? (Words)y : 0x7fc00000u - Words{}; };
  return may_have_nan(x) ? WordPair{one(x.a.v), one(x.b.v)} : bits_of(x);
}

// Rounds both to nearest even: rounds ties up, then clears the last bit of ties. This takes fewer
// operations than narrow() on each, but some NaNs overflow into numbers. Those whose low 16 bits
// are 0 do not.
template <Order kOrder>
RADAM_INLINE Halves round_bfloat16(const WordPair& x) {
  const WordPair u = {x.a + 0x8000u, x.b + 0x8000u};
  const Halves rounded = upper_halves<kOrder>(u), rest = lower_halves<kOrder>(u);
#if RADAM_VECTOR_BYTES == 32
  return rounded & (Halves)_mm256_adds_epu16((__m256i)rest, _mm256_set1_epi16(-2));
#else
  return rounded & ((Halves)(rest == 0) + static_cast<uint16_t>(0xffff));
#endif
}

template <typename To>
RADAM_INLINE void store_each(const Pair<float>& x, void* to) {
  float wide[2 * kWidth<float>];
  To narrowed[2 * kWidth<float>];
  write(x.a.v, wide, 0);
  write(x.b.v, wide, 1);
  for (int k = 0; k < 2 * kWidth<float>; ++k) narrowed[k] = narrow<To>(wide[k]);
  memcpy(to, narrowed, sizeof(narrowed));
}

template <Order kOrder>
RADAM_INLINE void store_bfloat16(const Pair<float>& x, void* to) {
  if constexpr (kOrder == kZipped) {
    // All inputs were bfloat16, so the low bits of a NaN are 0.
    write(round_bfloat16<kZipped>(bits_of(x)), to);
  } else {
#if RADAM_VECTOR_BYTES == 16
    write(round_bfloat16<kInOrder>(canonical(x)), to);
#elif RADAM_VECTOR_BYTES == 32
    if (may_have_nan(x)) return store_each<bfloat16>(x, to);
    const __m256i unzip = _mm256_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0,  //
                                          15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m256i quarters =
        _mm256_shuffle_epi8((__m256i)round_bfloat16<kZipped>(bits_of(x)), unzip);
    write(_mm256_permute4x64_epi64(quarters, 0xd8), to);
#else
    store_each<bfloat16>(x, to);
#endif
  }
}

RADAM_INLINE Pair<float> load_float16(const void* from) {
#if RADAM_VECTOR_BYTES == 64
  return {(Floats)_mm512_cvtph_ps(read<__m256i>(from, 0)),
          (Floats)_mm512_cvtph_ps(read<__m256i>(from, 1))};
#elif RADAM_VECTOR_BYTES == 32
  return {(Floats)_mm256_cvtph_ps(read<__m128i>(from, 0)),
          (Floats)_mm256_cvtph_ps(read<__m128i>(from, 1))};
#elif defined(__aarch64__)
  const float16x8_t both = read<float16x8_t>(from);
  return {(Floats)vcvt_f32_f16(vget_low_f16(both)), (Floats)vcvt_high_f32_f16(both)};
#else
  float16 narrow[2 * kWidth<float>];
  float wide[2 * kWidth<float>];
  memcpy(narrow, from, sizeof(narrow));
  for (int k = 0; k < 2 * kWidth<float>; ++k) wide[k] = widen(narrow[k]);
  return {read<Floats>(wide, 0), read<Floats>(wide, 1)};
#endif
}

RADAM_INLINE void store_float16(const Pair<float>& x, void* to) {
#if RADAM_VECTOR_BYTES == 64
  write(_mm512_cvtps_ph((__m512)x.a.v, _MM_FROUND_TO_NEAREST_INT), to, 0);
  write(_mm512_cvtps_ph((__m512)x.b.v, _MM_FROUND_TO_NEAREST_INT), to, 1);
#elif RADAM_VECTOR_BYTES == 32
  write(_mm256_cvtps_ph((__m256)x.a.v, _MM_FROUND_TO_NEAREST_INT), to, 0);
  write(_mm256_cvtps_ph((__m256)x.b.v, _MM_FROUND_TO_NEAREST_INT), to, 1);
#elif defined(__aarch64__)
  write(vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)x.a.v), (float32x4_t)x.b.v), to);
#else
  store_each<float16>(x, to);
#endif
}

template <typename T, DType kDType, Order kOrder>
RADAM_INLINE Pair<T> load(const void* from) {
  if constexpr (kDType == kBFloat16) {
    return load_bfloat16<kOrder>(from);
  } else if constexpr (kDType == kFloat16) {
    return load_float16(from);
  } else {
    static_assert(kDType == kFloat32 || kDType == kFloat64, "a dtype without load()");
    using V = typename Lanes<T>::V;
    return {read<V>(from, 0), read<V>(from, 1)};
  }
}

template <DType kDType, Order kOrder, typename T>
RADAM_INLINE void store(const Pair<T>& x, void* to) {
  if constexpr (kDType == kBFloat16) {
    store_bfloat16<kOrder>(x, to);
  } else if constexpr (kDType == kFloat16) {
    store_float16(x, to);
  } else {
    static_assert(kDType == kFloat32 || kDType == kFloat64, "a dtype without store()");
    write(x.a.v, to, 0);
    write(x.b.v, to, 1);
  }
}

}  // namespace
}  // namespace radam
