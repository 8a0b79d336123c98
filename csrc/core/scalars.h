// The scalars of a step: one list, which defines their order and the width of every table.
#pragma once

#ifdef __CUDACC__
#define RADAM_INLINE __host__ __device__ __forceinline__
#else
#define RADAM_INLINE inline __attribute__((always_inline))
#endif

// The fields of StepScalars, in the order of radam_kernels.schedule.StepScalars.
#define RADAM_STEP_SCALARS(X) \
  X(grad_scale)               \
  X(weight_decay)             \
  X(decay)                    \
  X(one_minus_beta1)          \
  X(beta2) X(one_minus_beta2) X(eps) X(step_size) X(action) X(key_low) X(key_high)

namespace radam {

// What a step does to a parameter; see radam_kernels.schedule.Action.
enum Action : int { kSkip = 0, kHold = 1, kMomentum = 2, kRectified = 3 };

struct StepScalars {
#define RADAM_FIELD(name) double name;
  RADAM_STEP_SCALARS(RADAM_FIELD)
#undef RADAM_FIELD
};

RADAM_INLINE Action action_of(const StepScalars& s) {
  return static_cast<Action>(static_cast<int>(s.action));
}

}  // namespace radam
