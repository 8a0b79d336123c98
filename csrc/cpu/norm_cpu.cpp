// The norm of a run of elements on the CPU. Compiled once for each instruction set, which RADAM_ISA
// names; all of them add in the same order, so they give the same bits.
//
// Sums are in float64, where squares of float32 neither overflow nor underflow and are exact. The
// elements are read as four streams: one alone does not keep enough cache lines in flight.
#include <cmath>
#include <cstring>

#include "core/dtypes.h"
#include "cpu/step_cpu.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define RADAM_CONCAT_(a, b) a##b
#define RADAM_CONCAT(a, b) RADAM_CONCAT_(a, b)

namespace radam {
namespace {

constexpr int kLanes = 8;
constexpr int kStreams = 4;
constexpr int kAhead = 1024;  // bytes to prefetch ahead, in each stream

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename V>
RADAM_INLINE V read(const void* from) {
  V vector;
  memcpy(&vector, from, sizeof(V));
  return vector;
}

RADAM_INLINE Doubles to_doubles(Floats x) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd((__m256)x);
#else
  return __builtin_convertvector(x, Doubles);
#endif
}

// Zero-extends 16-bit elements.
RADAM_INLINE Words read_extended(const void* from) {
#if defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(read<__m128i>(from));
#else
  return __builtin_convertvector(read<Halves>(from), Words);
#endif
}

// kLanes elements, in float64.
template <DType kDType>
RADAM_INLINE Doubles load(const void* from) {
  if constexpr (kDType == kFloat64) {
    return read<Doubles>(from);
  } else if constexpr (kDType == kFloat32) {
    return to_doubles(read<Floats>(from));
  } else if constexpr (kDType == kBFloat16) {
    return to_doubles((Floats)(read_extended(from) << 16));
  } else {
    static_assert(kDType == kFloat16, "a dtype without load()");
#if defined(__F16C__)
    return to_doubles((Floats)_mm256_cvtph_ps(read<__m128i>(from)));
#else
    float16 narrow[kLanes];
    memcpy(narrow, from, sizeof(narrow));
    Doubles wide;
    for (int k = 0; k < kLanes; ++k) wide[k] = widen(narrow[k]);
    return wide;
#endif
  }
}

template <Norm kNorm>
RADAM_INLINE void accumulate(Doubles& sum, Doubles g) {
  if constexpr (kNorm == kSumOfSquares) {
    sum += g * g;
  } else {
    const Doubles magnitude = g < 0 ? -g : g;
    if constexpr (kNorm == kSumOfMagnitudes) {
      sum += magnitude;
    } else {
      sum = (magnitude > sum) | (magnitude != magnitude) ? magnitude : sum;  // keeps NaN
    }
  }
}

template <DType kDType, Norm kNorm>
double norm_of(const char* data, int64_t numel) {
  constexpr int64_t kStride = kLanes * kDTypeSizes[kDType];
  const int64_t stream = numel / (kStreams * kLanes) * kStride;  // bytes
  Doubles sums[kStreams] = {};
  for (int64_t at = 0; at < stream; at += kStride) {
    for (int s = 0; s < kStreams; ++s) {
      const char* const from = data + s * stream + at;
      __builtin_prefetch(from + kAhead);
      accumulate<kNorm>(sums[s], load<kDType>(from));
    }
  }
  const char* rest = data + kStreams * stream;
  const char* const end = data + numel * kDTypeSizes[kDType];
  for (; end - rest >= kStride; rest += kStride) accumulate<kNorm>(sums[0], load<kDType>(rest));
  if (rest < end) {
    char last[kStride] = {};
    memcpy(last, rest, static_cast<size_t>(end - rest));
    accumulate<kNorm>(sums[1], load<kDType>(last));
  }
  double total = 0;
  for (const Doubles& sum : sums) {
    for (int k = 0; k < kLanes; ++k) {
      if constexpr (kNorm == kLargestMagnitude) {
        total = sum[k] > total || sum[k] != sum[k] ? sum[k] : total;
      } else {
        total += sum[k];
      }
    }
  }
  return total;
}

}  // namespace

double RADAM_CONCAT(partial_norm_, RADAM_ISA)(const void* data, int64_t numel, DType dtype,
                                              Norm norm) {
  return visit_dtype(dtype, [&](auto element) {
    constexpr DType kDType = decltype(element)::kDType;
    const char* const from = static_cast<const char*>(data);
    switch (norm) {
      case kSumOfMagnitudes:
        return norm_of<kDType, kSumOfMagnitudes>(from, numel);
      case kSumOfSquares:
        return norm_of<kDType, kSumOfSquares>(from, numel);
      case kLargestMagnitude:
        return norm_of<kDType, kLargestMagnitude>(from, numel);
    }
    throw std::invalid_argument("not a Norm");
  });
}

}  // namespace radam
