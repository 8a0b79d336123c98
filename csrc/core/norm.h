// The norms that clipping computes.
#pragma once

#include <cstdint>

namespace radam {

// The sum of |g|, the sum of g * g, or the largest |g|. A NaN makes each of them NaN.
enum Norm : int { kSumOfMagnitudes = 0, kSumOfSquares = 1, kLargestMagnitude = 2 };

// A gradient in memory: elements without gaps. A complex number counts as two.
struct GradientRow {
  const void* data;
  int64_t numel;
};
static_assert(sizeof(GradientRow) == 16, "these tables are passed as bytes");

}  // namespace radam
