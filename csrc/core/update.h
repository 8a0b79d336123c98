// The RAdam update of one element, shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>

#include "core/scalars.h"

namespace radam {

// StepScalars, narrowed once to the compute type T. Factor is the type of those that are often 1.
template <typename T, typename Factor = T>
struct Scalars {
  Factor grad_scale;
  T weight_decay;
  Factor decay;
  T one_minus_beta1, beta2, one_minus_beta2, eps, step_size;

  RADAM_INLINE explicit Scalars(const StepScalars& s)
      : grad_scale(static_cast<T>(s.grad_scale)),
        weight_decay(static_cast<T>(s.weight_decay)),
        decay(static_cast<T>(s.decay)),
        one_minus_beta1(static_cast<T>(s.one_minus_beta1)),
        beta2(static_cast<T>(s.beta2)),
        one_minus_beta2(static_cast<T>(s.one_minus_beta2)),
        eps(static_cast<T>(s.eps)),
        step_size(static_cast<T>(s.step_size)) {}
};

// The first half of an update, without the step: decays p, and updates m and v with gradient g.
// `l2` is whether weight_decay is nonzero: adding 0 * p would turn an infinite p into NaN.
template <typename T, typename Factor>
RADAM_INLINE void update_moments(T& p, T g, T& m, T& v, const Scalars<T, Factor>& s, bool l2) {
  g = g * s.grad_scale;
  if (l2) g = g + s.weight_decay * p;
  p = p * s.decay;
  m = m + s.one_minus_beta1 * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
}

// The second half.
template <typename T, typename Factor>
RADAM_INLINE void take_step(T& p, T m, T v, const Scalars<T, Factor>& s, Action action) {
  using std::sqrt;
  if (action == kRectified) {
    p = p - s.step_size * (m / (sqrt(v) + s.eps));
  } else if (action == kMomentum) {
    p = p - s.step_size * m;
  }
}

// Updates p, m and v in place with gradient g. Every operation rounds once (build without fused
// multiply-add), so every backend gives the same bits.
template <typename T, typename Factor>
RADAM_INLINE void radam_update(T& p, T g, T& m, T& v, const Scalars<T, Factor>& s, bool l2,
                               Action action) {
  update_moments(p, g, m, v, s, l2);
  take_step(p, m, v, s, action);
}

}  // namespace radam
