// The norm of a run of elements on the CPU. Compiled once for each instruction set, which RADAM_ISA
// names; all of them add in the same order, so they give the same bits.
//
// Sums are in float64, where squares of float32 neither overflow nor underflow and are exact. The
// elements are read as four streams: one alone does not keep enough cache lines in flight.
#include <cstring>

#include "cpu/lanes.h"
#include "cpu/step_cpu.h"

namespace radam {
namespace {

constexpr int kLanes = 8;
constexpr int kStreams = 4;
constexpr int kAhead = 1024;  // bytes to prefetch ahead, in each stream

// Of as many elements on every instruction set, unlike the vectors of lanes.h.
using Doubles8 = Vector<double, 8 * kLanes>::type;
using Floats8 = Vector<float, 4 * kLanes>::type;
using Words8 = Vector<uint32_t, 4 * kLanes>::type;
using Halves8 = Vector<uint16_t, 2 * kLanes>::type;

RADAM_INLINE Doubles8 widened(Floats8 x) {
#if defined(__AVX512F__)
  return (Doubles8)_mm512_cvtps_pd((__m256)x);
#else
  return __builtin_convertvector(x, Doubles8);
#endif
}

// Zero-extends 16-bit elements.
RADAM_INLINE Words8 read_extended8(const void* from) {
#if defined(__AVX2__)
  return (Words8)_mm256_cvtepu16_epi32(read<__m128i>(from));
#else
  return __builtin_convertvector(read<Halves8>(from), Words8);
#endif
}

// kLanes elements, in float64.
template <DType kDType>
RADAM_INLINE Doubles8 load8(const void* from) {
  if constexpr (kDType == kFloat64) {
    return read<Doubles8>(from);
  } else if constexpr (kDType == kFloat32) {
    return widened(read<Floats8>(from));
  } else if constexpr (kDType == kBFloat16) {
    return widened((Floats8)(read_extended8(from) << 16));
  } else {
    static_assert(kDType == kFloat16, "a dtype without load8()");
#if defined(__F16C__)
    return widened((Floats8)_mm256_cvtph_ps(read<__m128i>(from)));
#else
    static_assert(sizeof(Pair<float>) == sizeof(Floats8));
    return widened(bit_cast<Floats8>(load_float16(from)));
#endif
  }
}

template <Norm kNorm>
RADAM_INLINE void accumulate(Doubles8& sum, Doubles8 g) {
  if constexpr (kNorm == kTwo) {
    sum += g * g;
  } else {
#if defined(__aarch64__)
    for (int i = 0; i < kLanes / 2; ++i) {
      const float64x2_t magnitude = vabsq_f64(read<float64x2_t>(&g, i));
      const float64x2_t before = read<float64x2_t>(&sum, i);
      // Of a number and NaN, NaN is the maximum.
      write(kNorm == kOne ? before + magnitude : vmaxq_f64(before, magnitude), &sum, i);
    }
#else
    const Doubles8 magnitude = g < 0 ? -g : g;
    if constexpr (kNorm == kOne) {
      sum += magnitude;
    } else {
      sum = ((magnitude > sum) | (magnitude != magnitude)) ? magnitude : sum;  // keeps NaN
    }
#endif
  }
}

template <DType kDType, Norm kNorm>
double norm_of(const char* data, int64_t numel) {
  constexpr int64_t kStride = kLanes * kDTypeSizes[kDType];
  const int64_t stream = numel / (kStreams * kLanes) * kStride;  // bytes
  Doubles8 sums[kStreams] = {};
  for (int64_t at = 0; at < stream; at += kStride) {
    for (int s = 0; s < kStreams; ++s) {
      const char* const from = data + s * stream + at;
      __builtin_prefetch(from + kAhead);
      accumulate<kNorm>(sums[s], load8<kDType>(from));
    }
  }
  const char* rest = data + kStreams * stream;
  const char* const end = data + numel * kDTypeSizes[kDType];
  for (; end - rest >= kStride; rest += kStride) accumulate<kNorm>(sums[0], load8<kDType>(rest));
  if (rest < end) {
    char last[kStride] = {};
    memcpy(last, rest, static_cast<size_t>(end - rest));
    accumulate<kNorm>(sums[1], load8<kDType>(last));
  }
  double total = 0;
  for (const Doubles8& sum : sums) {
    for (int k = 0; k < kLanes; ++k) {
      if constexpr (kNorm == kLargest) {
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
      case kOne:
        return norm_of<kDType, kOne>(from, numel);
      case kTwo:
        return norm_of<kDType, kTwo>(from, numel);
      case kLargest:
        return norm_of<kDType, kLargest>(from, numel);
    }
    throw std::invalid_argument("not a Norm");
  });
}

}  // namespace radam
