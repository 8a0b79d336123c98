// What the launchers share: the segment, and the way from run-time dtypes to compile-time types.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtypes.h"

// A segment's fields, in the order of radam_kernels.flat.SEGMENT_FIELDS.
#define RADAM_SEGMENT(X) X(param) X(grad) X(exp_avg) X(exp_avg_sq) X(numel) X(scalars)

namespace radam {

// One contiguous run of elements: where its four streams are, and which StepScalars it obeys.
struct Segment {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t numel;
  int64_t scalars;
};
static_assert(sizeof(Segment) == 48, "the tables that Python and Triton build have 48-byte rows");

// A dtype set from codes that come from outside; throws std::invalid_argument.
inline DTypeSet dtype_set(int param, int grad, int state) {
  for (int code : {param, grad, state}) {
    if (code < 0 || code >= kDTypes) {
      throw std::invalid_argument("dtype code: expected 0 to 3, got " + std::to_string(code));
    }
  }
  const DTypeSet dtypes = {static_cast<DType>(param), static_cast<DType>(grad),
                           static_cast<DType>(state)};
  if (!supported(dtypes)) throw std::invalid_argument("float64 goes with float64 only");
  return dtypes;
}

}  // namespace radam
