// The element types, and the conversion of one element: bf16/fp16 <-> float, to nearest even.
// cpu/lanes.h has the same conversions on vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "core/scalars.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace radam {

// Storage only: arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Every element type: X(enumerator, torch's name, storage type). A new one needs a row here,
// widen() and narrow() below, and load() and store() in cpu/lanes.h; without these it doesn't
// compile.
#define RADAM_DTYPES(X)            \
  X(kFloat32, float32, float)      \
  X(kBFloat16, bfloat16, bfloat16) \
  X(kFloat16, float16, float16)    \
  X(kFloat64, float64, double)

#define RADAM_ENUMERATOR(dtype, name, type) dtype,
#define RADAM_STRING(dtype, name, type) #name,
#define RADAM_SIZE(dtype, name, type) static_cast<int>(sizeof(type)),
enum DType : int { RADAM_DTYPES(RADAM_ENUMERATOR) };
constexpr const char* kDTypeNames[] = {RADAM_DTYPES(RADAM_STRING)};
constexpr int kDTypeSizes[] = {RADAM_DTYPES(RADAM_SIZE)};
constexpr int kDTypes = sizeof(kDTypeSizes) / sizeof(kDTypeSizes[0]);
#undef RADAM_ENUMERATOR
#undef RADAM_STRING
#undef RADAM_SIZE

// A DType as a type, with its storage type and its compute type.
template <DType kDType>
struct Element;
#define RADAM_ELEMENT(dtype, name, type)                                  \
  template <>                                                             \
  struct Element<dtype> {                                                 \
    static constexpr DType kDType = dtype;                                \
    using Storage = type;                                                 \
    using Compute = std::conditional_t<sizeof(type) == 8, double, float>; \
  };
RADAM_DTYPES(RADAM_ELEMENT)
#undef RADAM_ELEMENT

// The dtypes of one launch: parameters, gradients, both moments.
struct DTypeSet {
  DType param, grad, state;
};

constexpr bool operator==(const DTypeSet& a, const DTypeSet& b) {
  return a.param == b.param && a.grad == b.grad && a.state == b.state;
}

// float64 mixes with float64 only. float32, bfloat16 and float16 mix freely and compute in float.
constexpr bool supported(const DTypeSet& d) {
  return (d.param == kFloat64) == (d.grad == kFloat64) &&
         (d.param == kFloat64) == (d.state == kFloat64);
}

// The dtype of a parameter's moments: float64 for float64, otherwise `requested`, or float32 if
// that is negative.
constexpr DType state_dtype(DType param, int requested) {
  return param == kFloat64 ? kFloat64 : requested < 0 ? kFloat32 : static_cast<DType>(requested);
}

// Dispatches on a dtype: calls visit(Element<dtype>{}).
template <typename Visit>
auto visit_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
#define RADAM_CASE(dtype, name, type) \
  case dtype:                         \
    return visit(Element<dtype>{});
    RADAM_DTYPES(RADAM_CASE)
#undef RADAM_CASE
  }
  throw std::invalid_argument("not a DType");
}

// Dispatches on a supported set: calls visit(Element<param>{}, Element<grad>{}, Element<state>{}).
template <typename Visit>
auto visit_dtypes(const DTypeSet& dtypes, const Visit& visit) {
  using Result = decltype(visit(Element<kFloat32>{}, Element<kFloat32>{}, Element<kFloat32>{}));
  return visit_dtype(dtypes.param, [&](auto param) {
    return visit_dtype(dtypes.grad, [&](auto grad) {
      return visit_dtype(dtypes.state, [&](auto state) -> Result {
        if constexpr (supported({param.kDType, grad.kDType, state.kDType})) {
          return visit(param, grad, state);
        } else {
          throw std::invalid_argument("float64 goes with float64 only");
        }
      });
    });
  });
}

template <typename To, typename From>
RADAM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

RADAM_INLINE float widen(float x) { return x; }
RADAM_INLINE double widen(double x) { return x; }

RADAM_INLINE float widen(bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

RADAM_INLINE float widen(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Move the bits in place and scale by 2^112: exact for subnormals too. Exponent 31 is inf or NaN.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
#endif
}

template <typename To>
RADAM_INLINE To narrow(float x);

template <>
RADAM_INLINE float narrow<float>(float x) {
  return x;
}

template <>
RADAM_INLINE bfloat16 narrow<bfloat16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x0040u;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
}

template <>
RADAM_INLINE float16 narrow<float16>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal results: rebias the exponent and round on the bits; a carry past the top gives inf.
  const uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = a >= 0x47800000u ? special : a < 0x38800000u ? tiny : normal;
  return {static_cast<uint16_t>(sign | magnitude)};
#endif
}

template <typename To>
RADAM_INLINE To narrow(double x);

template <>
RADAM_INLINE double narrow<double>(double x) {
  return x;
}

}  // namespace radam
