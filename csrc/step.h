// What the launchers share: the segment, and the way from run-time dtypes to compile-time types.
#pragma once

#include <cstdint>

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

}  // namespace radam
