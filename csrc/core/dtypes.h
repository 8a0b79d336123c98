// The element types, and the conversion of one element: bf16/fp16 <-> float, to nearest even.
// cpu/lanes.h has the same conversions on vectors. core/formats.h has the formats for low memory.
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

// Storage of the formats for low memory: types of their own, so that templates tell them apart.
struct bfloat16_stochastic {
  uint16_t bits;
};
struct master24 {
  uint16_t bits;
};
struct master32 {
  uint16_t bits;
};
struct block8 {
  uint8_t bits;
};

// Every element type: X(enumerator, torch's name, storage type). A new one needs a row here,
// widen() and narrow() below, and load() and store() in cpu/lanes.h; without these it doesn't
// compile.
#define RADAM_DTYPES(X)            \
  X(kFloat32, float32, float)      \
  X(kBFloat16, bfloat16, bfloat16) \
  X(kFloat16, float16, float16)    \
  X(kFloat64, float64, double)

// The formats for low memory, which tensors of several dtypes make up together; see core/formats.h.
#define RADAM_FORMATS(X)                                           \
  X(kBFloat16Stochastic, bfloat16_stochastic, bfloat16_stochastic) \
  X(kMaster24, master24, master24)                                 \
  X(kMaster32, master32, master32)                                 \
  X(kBlock8, block8, block8)

#define RADAM_ENUMERATOR(dtype, name, type) dtype,
#define RADAM_STRING(dtype, name, type) #name,
#define RADAM_SIZE(dtype, name, type) static_cast<int>(sizeof(type)),
enum DType : int { RADAM_DTYPES(RADAM_ENUMERATOR) RADAM_FORMATS(RADAM_ENUMERATOR) };
constexpr const char* kDTypeNames[] = {RADAM_DTYPES(RADAM_STRING) RADAM_FORMATS(RADAM_STRING)};
constexpr int kDTypeSizes[] = {RADAM_DTYPES(RADAM_SIZE) RADAM_FORMATS(RADAM_SIZE)};
constexpr int kFormats = sizeof(kDTypeSizes) / sizeof(kDTypeSizes[0]);  // and dtypes
constexpr int kDTypes = kBFloat16Stochastic;                            // without the formats
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
RADAM_FORMATS(RADAM_ELEMENT)
#undef RADAM_ELEMENT

// The dtypes or formats of one launch: parameters, gradients, both moments.
struct DTypeSet {
  DType param, grad, state;
};

constexpr bool operator==(const DTypeSet& a, const DTypeSet& b) {
  return a.param == b.param && a.grad == b.grad && a.state == b.state;
}

constexpr bool is_format(DType dtype) { return dtype >= kDTypes; }
constexpr bool has_remainder(DType param) { return param == kMaster24 || param == kMaster32; }
constexpr bool is_low_memory(const DTypeSet& d) { return is_format(d.param) || is_format(d.state); }

// The dtype of the tensor that holds a weight in this format.
constexpr DType weight_dtype(DType param) { return is_format(param) ? kBFloat16 : param; }

// float64 mixes with float64 only. float32, bfloat16 and float16 mix freely and compute in float.
// The formats for low memory are combined as the options of a group combine them, and go with
// gradients of float32 or of the weight's dtype.
constexpr bool supported(const DTypeSet& d) {
  if (is_format(d.grad) || d.param == kBlock8 || has_remainder(d.state)) return false;
  if (!is_low_memory(d)) {
    return (d.param == kFloat64) == (d.grad == kFloat64) &&
           (d.param == kFloat64) == (d.state == kFloat64);
  }
  if (d.param == kFloat64 || (d.grad != kFloat32 && d.grad != weight_dtype(d.param))) return false;
  if (d.state == kBlock8) return true;
  if (d.state == kBFloat16Stochastic) return d.param == kFloat32 || is_format(d.param);
  return d.state == kFloat32 || (d.state == kBFloat16 && has_remainder(d.param));
}

// The options of a parameter group that choose formats.
struct FormatOptions {
  int state_dtype = -1;  // a DType of up to 32 bits, kBlock8, or -1 for the default
  int master_weights = 0;
  bool stochastic_rounding = false;
};

// The format of a parameter of this dtype under the options. Complex ones have their dtype.
constexpr DType param_format(DType param, bool complex, const FormatOptions& options) {
  if (param != kBFloat16 || complex) return param;
  return options.master_weights == 32   ? kMaster32
         : options.master_weights == 24 ? kMaster24
         : options.stochastic_rounding  ? kBFloat16Stochastic
                                        : kBFloat16;
}

// The dtype or format of a parameter's moments: float64 for float64, otherwise what is requested,
// or float32. There is no complex bfloat16, and no complex format.
constexpr DType state_format(DType param, bool complex, const FormatOptions& options) {
  if (param == kFloat64) return kFloat64;
  const int requested = options.state_dtype;
  if (complex) return requested == kFloat16 ? kFloat16 : kFloat32;
  if (requested == kBFloat16 && options.stochastic_rounding) return kBFloat16Stochastic;
  return requested < 0 ? kFloat32 : static_cast<DType>(requested);
}

// Dispatches on a dtype: calls visit(Element<dtype>{}).
#define RADAM_CASE(dtype, name, type) \
  case dtype:                         \
    return visit(Element<dtype>{});
#define RADAM_NOT(dtype, name, type) \
  case dtype:                        \
    break;
template <typename Visit>
auto visit_dtype(DType dtype, const Visit& visit) {
  switch (dtype) { RADAM_DTYPES(RADAM_CASE) RADAM_FORMATS(RADAM_NOT) }
  throw std::invalid_argument("not a dtype of a tensor");
}

// Likewise, for a dtype or a format.
template <typename Visit>
auto visit_format(DType dtype, const Visit& visit) {
  switch (dtype) { RADAM_DTYPES(RADAM_CASE) RADAM_FORMATS(RADAM_CASE) }
  throw std::invalid_argument("not a DType");
}
#undef RADAM_CASE
#undef RADAM_NOT

// Dispatches on a supported set: calls visit(Element<param>{}, Element<grad>{}, Element<state>{}).
template <typename Visit>
auto visit_dtypes(const DTypeSet& dtypes, const Visit& visit) {
  using Result = decltype(visit(Element<kFloat32>{}, Element<kFloat32>{}, Element<kFloat32>{}));
  return visit_format(dtypes.param, [&](auto param) {
    return visit_dtype(dtypes.grad, [&](auto grad) {
      return visit_format(dtypes.state, [&](auto state) -> Result {
        if constexpr (supported({param.kDType, grad.kDType, state.kDType})) {
          return visit(param, grad, state);
        } else {
          throw std::invalid_argument("dtypes that do not go together");
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
