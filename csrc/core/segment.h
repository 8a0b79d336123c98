// The tables that a launch reads: a row for each tensor, which seldom changes, and the address of
// each gradient.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtypes.h"

// The fields of a segment, 8 bytes each; Python and Triton take their order from here.
#define RADAM_SEGMENT(X) X(param) X(exp_avg) X(exp_avg_sq) X(numel) X(scalars)
#define RADAM_LOW_MEMORY(X) \
  X(remainder) X(exp_avg_exponent) X(exp_avg_sq_exponent) X(first_index) X(key)

namespace radam {

// One contiguous run of elements: its addresses, its length, and the index of its StepScalars.
struct Segment {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t numel;
  int64_t scalars;
};

// What a segment has in addition if its formats are for low memory. Null where there is none.
struct LowMemory {
  void* remainder;            // int8 or int16 for each element: the bits below a bfloat16 weight
  void* exp_avg_exponent;     // uint8 for each block of kBlock elements
  void* exp_avg_sq_exponent;  // likewise
  uint64_t first_index;       // of the first element, in the whole parameter
  uint64_t key;               // parameter_key()
};
#define RADAM_COUNT(name) +1
static_assert(sizeof(Segment) == 8 * (0 RADAM_SEGMENT(RADAM_COUNT)) &&
                  sizeof(LowMemory) == 8 * (0 RADAM_LOW_MEMORY(RADAM_COUNT)),
              "a field of 8 bytes each");
#undef RADAM_COUNT

// The segments of one launch. Gradients are a separate column because most of them move at every
// step.
struct Segments {
  const Segment* rows;
  const void* const* grads;
  const LowMemory* low_memory;  // null for plain dtypes
  int64_t count;
};

// Validates dtype codes; throws std::invalid_argument.
inline DTypeSet dtype_set(int param, int grad, int state) {
  for (int code : {param, grad, state}) {
    if (code < 0 || code >= kFormats) {
      throw std::invalid_argument("dtype code: expected 0 to " + std::to_string(kFormats - 1) +
                                  ", got " + std::to_string(code));
    }
  }
  const DTypeSet dtypes = {static_cast<DType>(param), static_cast<DType>(grad),
                           static_cast<DType>(state)};
  if (!supported(dtypes)) {
    throw std::invalid_argument(std::string("dtypes that do not go together: ") +
                                kDTypeNames[param] + ", " + kDTypeNames[grad] + " and " +
                                kDTypeNames[state]);
  }
  return dtypes;
}

}  // namespace radam
