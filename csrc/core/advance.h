// Increments step counts that are stored on the device (capturable), and makes their StepScalars.
// For the host and the device.
#pragma once

#include "core/dtypes.h"
#include "core/schedule.h"

namespace radam {

// A step count in memory, and the group whose hyperparameters apply to it.
struct Counter {
  void* step;
  int32_t dtype;  // kFloat32 or kFloat64
  int32_t group;  // a row of Hyperparameters
};
static_assert(sizeof(Counter) == 16, "these tables are passed as bytes");

// GradScaler's attributes on an optimizer: one float each on the device of the counters, or null.
struct Scaling {
  const float* grad_scale;  // the gradients are divided by it
  const float* found_inf;   // nonzero (it may be 2): skip the step, don't count it
};

RADAM_INLINE double read_number(const void* data, int dtype) {
  switch (static_cast<DType>(dtype)) {
#define RADAM_CASE(dtype, name, type) \
  case dtype:                         \
    return widen(*static_cast<const type*>(data));
    RADAM_DTYPES(RADAM_CASE)
#undef RADAM_CASE
#define RADAM_CASE(dtype, name, type) case dtype:
    RADAM_FORMATS(RADAM_CASE)
#undef RADAM_CASE
    break;
  }
  return 0.0;
}

// The count plus one, in the count's own dtype: a float32 count stops at 2^24, as torch's does.
RADAM_INLINE double next_count(const void* step, int dtype) {
  if (dtype == kFloat64) return *static_cast<const double*>(step) + 1.0;
  return *static_cast<const float*>(step) + 1.0f;
}

RADAM_INLINE void write_count(void* step, int dtype, double count) {
  if (dtype == kFloat64) {
    *static_cast<double*>(step) = count;
  } else {
    *static_cast<float*>(step) = static_cast<float>(count);
  }
}

// Increments one step count and returns the scalars of that step. The step is skipped and not
// counted if found_inf is set, or if the count or the options are invalid: a device can't raise.
RADAM_INLINE StepScalars advance(const Counter& counter, const Hyperparameters* groups,
                                 const Scaling& scaling) {
  const StepScalars skip = {};
  static_assert(kSkip == 0, "scalars that are all zero skip");
  if (scaling.found_inf && *scaling.found_inf != 0) return skip;
  Hyperparameters h = groups[counter.group];
  if (h.lr_data) h.lr = read_number(h.lr_data, h.lr_dtype);
  if (scaling.grad_scale) h.grad_scale /= *scaling.grad_scale;
  const double t = next_count(counter.step, counter.dtype);
  if (!valid(h, t)) return skip;
  write_count(counter.step, counter.dtype, t);
  return step_scalars(h, t);
}

}  // namespace radam
