// The tables that a launch reads: a row for each tensor, which seldom changes, and the address of
// each gradient.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtypes.h"

// The fields of a segment, 8 bytes each; Python and Triton take their order from here.
#define RADAM_SEGMENT(X) X(param) X(exp_avg) X(exp_avg_sq) X(numel) X(scalars)

namespace radam {

// One contiguous run of elements: its addresses, its length, and the index of its StepScalars.
struct Segment {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t numel;
  int64_t scalars;
};
#define RADAM_COUNT(name) +1
static_assert(sizeof(Segment) == 8 * (0 RADAM_SEGMENT(RADAM_COUNT)), "a field of 8 bytes each");
#undef RADAM_COUNT

// The segments of one launch. Gradients are a separate column because most of them move at every
// step.
struct Segments {
  const Segment* rows;
  const void* const* grads;
  int64_t count;
};

// Validates dtype codes; throws std::invalid_argument.
inline DTypeSet dtype_set(int param, int grad, int state) {
  for (int code : {param, grad, state}) {
    if (code < 0 || code >= kDTypes) {
      throw std::invalid_argument("dtype code: expected 0 to " + std::to_string(kDTypes - 1) +
                                  ", got " + std::to_string(code));
    }
  }
  const DTypeSet dtypes = {static_cast<DType>(param), static_cast<DType>(grad),
                           static_cast<DType>(state)};
  if (!supported(dtypes)) throw std::invalid_argument("float64 goes with float64 only");
  return dtypes;
}

}  // namespace radam
