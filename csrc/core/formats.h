// The formats for low memory: weights of 24 or 32 bits in a bfloat16 and a remainder, bfloat16 with
// stochastic rounding, and 8-bit floats in blocks that share an exponent. They are codecs around
// radam_update(), in integer operations only. radam_kernels/formats.py is the same in torch and
// explains them; cpu/formats_lanes.h has vectors of them.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/scalars.h"

namespace radam {

// Random bits: a hash of (seed, step) and of the parameter gives a key, and a hash of the key and
// the element's index a word.
struct Key {
  uint32_t low, high;
};

RADAM_INLINE uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

RADAM_INLINE Key step_key(double seed, double t) {
  const uint64_t key = splitmix64((static_cast<uint64_t>(seed) << 32) ^ static_cast<uint64_t>(t));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// Hashed twice, so that it is not the key of a step. `ordinal` is the parameter's place among all
// of the optimizer; `shard` tells apart shards that have no index in the whole parameter.
RADAM_INLINE uint64_t parameter_key(uint32_t ordinal, uint32_t shard) {
  return splitmix64(splitmix64((static_cast<uint64_t>(shard) << 32) | ordinal));
}

RADAM_INLINE uint32_t mix32(uint32_t x, uint32_t high) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= (x >> 15) ^ high;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The key of a parameter in a step, for the elements whose index has these upper 32 bits.
RADAM_INLINE Key element_key(const Key& step, uint64_t parameter, uint32_t index_high) {
  const Key key = {step.low ^ static_cast<uint32_t>(parameter),
                   step.high ^ static_cast<uint32_t>(parameter >> 32)};
  if (index_high == 0) return key;
  return {mix32(key.low ^ index_high, key.high), mix32(key.high ^ index_high, key.low)};
}

RADAM_INLINE Key element_key(const StepScalars& scalars, uint64_t parameter, uint32_t index_high) {
  const Key step = {static_cast<uint32_t>(scalars.key_low),
                    static_cast<uint32_t>(scalars.key_high)};
  return element_key(step, parameter, index_high);
}

// The random word of an element; `index` is the lower half of its index.
RADAM_INLINE uint32_t random_word(const Key& key, uint32_t index) {
  return mix32(index * 0x9E3779B1u + key.low, key.high);
}

// What the streams take of a word. exp_avg has 8 bits, and half of the last: its error averages
// out. exp_avg_sq needs all 16, or it decays too fast. A weight of bfloat16 has 16 of its own.
RADAM_INLINE uint32_t random_exp_avg(uint32_t word) { return (word & 0xff00u) | 0x80u; }
RADAM_INLINE uint32_t random_exp_avg_sq(uint32_t word) { return word >> 16; }
RADAM_INLINE uint32_t random_weight16(uint32_t word) {
  return ((word ^ (word >> 15)) * 0x2C1B3C6Du) >> 16;
}
RADAM_INLINE uint32_t random_weight8(uint32_t word) { return word & 0xffu; }

RADAM_INLINE bool is_nan(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }

// bfloat16, rounded up in magnitude if the bits that are cut off and 16 random ones carry.
RADAM_INLINE uint16_t round_stochastically(float x, uint32_t random16) {
  const uint32_t u = bit_cast<uint32_t>(x);
  return static_cast<uint16_t>(is_nan(u) ? 0x7fc0u : (u + random16) >> 16);
}

// A float32 as a bfloat16 and the difference to it, in units of its last place / 2^16.
struct SplitWeight {
  uint16_t weight;
  int16_t remainder;
};

// The nearest bfloat16, ties away from zero: ties to even could not be joined again.
RADAM_INLINE SplitWeight split_weight32(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  u = is_nan(u) ? 0x7fc00000u : u;
  return {static_cast<uint16_t>((u + 0x8000u) >> 16), static_cast<int16_t>(u)};
}

// Likewise with a remainder of 8 bits, stochastically rounded.
RADAM_INLINE SplitWeight split_weight24(float x, uint32_t random8) {
  uint32_t u = bit_cast<uint32_t>(x);
  u = is_nan(u) ? 0x7fc00000u : u + random8;
  return {static_cast<uint16_t>((u + 0x8000u) >> 16), static_cast<int8_t>(u >> 8)};
}

// The float32 of a weight and its remainder in units of 2^-16. A weight that was set to zero or
// infinity since can have a remainder that would make it NaN, which counts as 0.
RADAM_INLINE float join_weight(uint16_t weight, int32_t remainder) {
  const uint32_t magnitude = weight & 0x7fffu;
  const bool stale = (magnitude == 0 && remainder < 0) || (magnitude == 0x7f80u && remainder > 0);
  return bit_cast<float>((static_cast<uint32_t>(weight) << 16) +
                         static_cast<uint32_t>(stale ? 0 : remainder));
}

// Block floats. A code is the top of a float32 whose exponent field is counted down from that of
// its block: exp_avg has a sign, 4 exponent and 3 mantissa bits, exp_avg_sq 5 and 3.
constexpr int kBlock = 128;
enum Moment { kExpAvgMoment, kExpAvgSqMoment };
template <Moment kMoment>
constexpr uint32_t kExponentSpan = kMoment == kExpAvgMoment ? 15 : 31;
constexpr int kDropped = 20;  // mantissa bits

// The exponent byte of a block, from the largest magnitude in it (bits of a float32): the exponent
// after rounding up, so that the largest element never overflows. 255, if one is not finite: then
// the whole block is NaN.
template <Moment kMoment>
RADAM_INLINE uint32_t block_exponent(uint32_t largest) {
  const uint32_t exponent = (largest + ((1u << kDropped) - 1)) >> 23;
  const uint32_t least = kExponentSpan<kMoment> + 1;
  return exponent < least ? least : exponent > 255 ? 255 : exponent;
}

// Subtracted from the rounded top of a float32.
template <Moment kMoment>
RADAM_INLINE int32_t block_base(uint32_t exponent) {
  return static_cast<int32_t>(exponent == 255 ? 512 : exponent - kExponentSpan<kMoment>) << 3;
}

template <Moment kMoment>
RADAM_INLINE uint8_t encode_block8(uint32_t u, int32_t base, uint32_t random16) {
  const uint32_t magnitude = u & 0x7fffffffu;
  const int32_t top = static_cast<int32_t>((magnitude + (random16 << 4)) >> kDropped) - base;
  if (kMoment == kExpAvgMoment) {
    return static_cast<uint8_t>((top > 0 ? top : 0) | static_cast<int32_t>(u >> 31 << 7));
  }
  const int32_t least = magnitude != 0;  // the denominator of a step never becomes 0
  return static_cast<uint8_t>(top > least ? top : least);
}

template <Moment kMoment>
RADAM_INLINE float decode_block8(uint8_t code, uint32_t exponent) {
  const uint32_t top = kMoment == kExpAvgMoment ? code & 0x7fu : code;
  uint32_t u = top == 0 ? 0 : (top << kDropped) + ((exponent - kExponentSpan<kMoment>) << 23);
  if (exponent == 255) u |= 0x7fc00000u;
  if (kMoment == kExpAvgMoment) u |= static_cast<uint32_t>(code >> 7) << 31;
  return bit_cast<float>(u);
}

}  // namespace radam
