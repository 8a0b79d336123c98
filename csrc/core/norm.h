// The norms of gradients that clipping needs.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace radam {

// What is taken of all elements: the sum of |g|, the sum of squares, or the largest |g|. A NaN
// makes each of them NaN.
enum Norm : int { kOne, kTwo, kLargest };

// The Norm of an order: inf, 1 or 2. Throws std::invalid_argument for any other.
inline Norm norm_of_order(double order) {
  if (order == 1) return kOne;
  if (order == 2) return kTwo;
  if (order > 0 && std::isinf(order)) return kLargest;
  throw std::invalid_argument("norm_type: expected 1, 2 or inf, got " + std::to_string(order));
}

// A row of a table of gradients: dense, aligned to an element. A complex number counts as two.
struct Gradient {
  const void* data;
  int64_t numel;
};
static_assert(sizeof(Gradient) == 16, "these tables are passed as bytes");

}  // namespace radam
