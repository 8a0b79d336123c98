// The codecs of the formats in the CUDA kernel: those of core/formats.h, in fewer instructions.
#pragma once

#include "core/formats.h"
#include "cuda/launch.h"

namespace radam {
namespace {

template <typename P>
using Compute = std::conditional_t<sizeof(P) == 8, double, float>;

template <typename A, typename B>
constexpr bool kSame = std::is_same_v<A, B>;

// The bits below a weight; `char` stands for none.
template <typename P>
using Remainder = std::conditional_t<kSame<P, master32>, int16_t,
                                     std::conditional_t<kSame<P, master24>, int8_t, char>>;
template <typename P>
constexpr bool kHasRemainder = !kSame<Remainder<P>, char>;

template <typename P, typename S>
constexpr bool kRandom = kSame<P, bfloat16_stochastic> || kSame<P, master24> ||
                         kSame<S, bfloat16_stochastic> || kSame<S, block8>;
template <typename P, typename S>
constexpr bool kLowMemory = kRandom<P, S> || kHasRemainder<P>;

// As join_weight(), split_weight32() and split_weight24() in core/formats.h, in fewer instructions.
template <typename P>
__device__ __forceinline__ Compute<P> decode_weight(P weight, Remainder<P> remainder) {
  if constexpr (kHasRemainder<P>) {
    const uint32_t high = static_cast<uint32_t>(weight.bits) << 16;
    const int32_t low = kSame<P, master24> ? remainder * 256 : remainder;
    const float joined = bit_cast<float>(high + static_cast<uint32_t>(low));
    // NaN, if the weight is not, of a stale remainder beside zero or infinity only.
    return joined != joined ? bit_cast<float>(high) : joined;
  } else if constexpr (kSame<P, bfloat16_stochastic>) {
    return widen(bfloat16{weight.bits});
  } else {
    return widen(weight);
  }
}

template <typename P>
__device__ __forceinline__ void encode_weight(Compute<P> x, uint32_t word, P& weight,
                                              Remainder<P>& remainder) {
  if constexpr (kHasRemainder<P>) {
    const uint32_t random = kSame<P, master24> ? random_weight8(word) : 0;
    const uint32_t u = x != x ? 0x7fc00000u : bit_cast<uint32_t>(x) + random;
    weight = {static_cast<uint16_t>((u + 0x8000u) >> 16)};
    remainder = static_cast<Remainder<P>>(kSame<P, master24> ? u >> 8 : u);
  } else if constexpr (kSame<P, bfloat16_stochastic>) {
    weight = {round_stochastically(x, random_weight16(word))};
  } else {
    weight = narrow<P>(x);
  }
}

template <Moment kMoment>
__device__ __forceinline__ uint32_t random_moment(uint32_t word) {
  return kMoment == kExpAvgMoment ? random_exp_avg(word) : random_exp_avg_sq(word);
}

template <typename T, typename S>
__device__ __forceinline__ T decode_moment(S moment) {
  if constexpr (kSame<S, bfloat16_stochastic>) {
    return widen(bfloat16{moment.bits});
  } else {
    return widen(moment);
  }
}

template <Moment kMoment, typename S, typename T>
__device__ __forceinline__ S encode_moment(T x, uint32_t word) {
  if constexpr (kSame<S, bfloat16_stochastic>) {
    return {round_stochastically(x, random_moment<kMoment>(word))};
  } else {
    return narrow<S>(x);
  }
}

constexpr int kWarp = 32;

// The largest number of kLanes neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t x) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, x, distance);
    x = x > other ? x : other;
  }
  return x;
}

// The codecs of block8 below are those of core/formats.h in fewer instructions. `code` has the code
// in its upper 8 bits, and `exponents` is what add_exponents() says.
template <Moment kMoment>
__device__ __forceinline__ uint32_t add_exponents(uint32_t exponent) {
  return (exponent - kExponentSpan<kMoment>) << 23;
}

template <Moment kMoment>
__device__ __forceinline__ float decode_code(uint32_t code, uint32_t exponents) {
  // The sign goes with the shift.
  const uint32_t shifted =
      kMoment == kExpAvgMoment ? static_cast<uint32_t>(static_cast<int32_t>(code) >> 4) : code >> 4;
  constexpr uint32_t kTop = kMoment == kExpAvgMoment ? 0x07f00000u : 0x0ff00000u;
  constexpr uint32_t kSign = kMoment == kExpAvgMoment ? 0x80000000u : 0;
  const uint32_t u = shifted & (kTop | kSign);
  return bit_cast<float>(shifted & kTop ? u + exponents : u);
}

// What encode_code() subtracts: block_base() in the place of the rounded top, or for a block that
// is not finite what leaves nothing.
template <Moment kMoment>
__device__ __forceinline__ int32_t subtract_base(uint32_t exponent) {
  return exponent == 255 ? INT32_MAX : block_base<kMoment>(exponent) << kDropped;
}

template <Moment kMoment>
__device__ __forceinline__ uint32_t encode_code(float x, int32_t base, uint32_t word) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (kMoment == kExpAvgMoment) {
    const uint32_t rounded = (u & 0x7fffffffu) + (random_exp_avg(word) << 4);
    const int32_t top = static_cast<int32_t>(rounded - static_cast<uint32_t>(base));
    return (static_cast<uint32_t>(top > 0 ? top : 0) << 4 & 0x7fffffffu) | (u & 0x80000000u);
  }
  const uint32_t rounded = (u & 0x7fffffffu) + (random_exp_avg_sq(word) << 4);
  const int32_t top = static_cast<int32_t>(rounded - static_cast<uint32_t>(base));
  const int32_t least = u << 1 ? 1 << kDropped : 0;
  return static_cast<uint32_t>(top > least ? top : least) << 4;
}

// Byte j of a word in the upper 8 bits.
__device__ __forceinline__ uint32_t code_of(uint32_t codes, int j) { return codes << (24 - 8 * j); }

// The largest magnitude of the elements of a lane.
template <int kN>
__device__ __forceinline__ uint32_t largest_of(const float (&x)[kN]) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const uint32_t magnitude = bit_cast<uint32_t>(x[j]) & 0x7fffffffu;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest;
}

}  // namespace
}  // namespace radam
