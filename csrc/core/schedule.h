// Computes StepScalars from a step count and hyperparameters, in float64, on the host and on the
// device. radam_kernels/schedule.py is the same in Python and explains the formulas. Both do the
// same operations in the same order, so on the host they give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/formats.h"

namespace radam {

// The options of a parameter group that are plain numbers or flags. lr (a number, or a tensor that
// the device reads), betas, rectification and grad_scale are read separately.
#define RADAM_HYPERPARAMETERS(NUMBER, FLAG) \
  NUMBER(eps)                               \
  NUMBER(weight_decay)                      \
  NUMBER(rho_threshold)                     \
  NUMBER(seed) FLAG(decoupled_weight_decay) FLAG(maximize) FLAG(degenerated_to_sgd)

struct Hyperparameters {
#define RADAM_NUMBER(name) double name;
#define RADAM_FLAG(name) bool name;
  double lr, beta1, beta2, grad_scale;
  RADAM_HYPERPARAMETERS(RADAM_NUMBER, RADAM_FLAG)
  bool exact;
#undef RADAM_NUMBER
#undef RADAM_FLAG
  int32_t lr_dtype;     // the DType of *lr_data
  const void* lr_data;  // the address of lr on the device; null if `lr` has the value
};
static_assert(sizeof(Hyperparameters) == 8 * sizeof(double) + 4 + sizeof(int32_t) + sizeof(void*),
              "no padding: rows are compared by their bytes");

RADAM_INLINE bool valid(const Hyperparameters& h, double t) {
  return t >= 1 && t <= 0x1p53 && t == std::floor(t) && h.beta1 >= 0 && h.beta1 < 1 &&
         h.beta2 >= 0 && h.beta2 < 1 && h.eps >= 0 && h.rho_threshold >= (h.exact ? 2 : 4) &&
         h.seed >= 0 && h.seed < 0x1p32 && h.seed == std::floor(h.seed);
}

RADAM_INLINE double bias_correction(double t, double beta) {
  return beta != 0 ? -std::expm1(t * std::log(beta)) : 1.0;
}

RADAM_INLINE double rho_inf(double beta2) { return 2.0 / (1.0 - beta2) - 1.0; }

// coth y - 1/y, by Lambert's continued fraction.
RADAM_INLINE double langevin(double y) {
  const double s = y * y;
  return y / (3.0 + s / (5.0 + s / (7.0 + s / (9.0 + s / (11.0 + s / (13.0 + s / 15.0))))));
}

// rho_inf - 2 t beta2^t / (1 - beta2^t), without cancellation.
RADAM_INLINE double rho(double t, double beta2) {
  if (beta2 == 0) return 1.0;
  const double h = -std::log(beta2);
  const double th = t * h;
  if (th > 50.0) return rho_inf(beta2);
  if (th > 1.0) return rho_inf(beta2) - 2.0 * t / std::expm1(th);
  return t + langevin(0.5 * h) - t * langevin(0.5 * th);
}

// The variance of the adaptive learning rate. Only called above the smallest threshold that valid()
// accepts, where it is finite.
RADAM_INLINE double adaptive_variance_first_order(double rho) {
  return rho / (2.0 * (rho - 2.0) * (rho - 4.0));
}

RADAM_INLINE double adaptive_variance(double rho) {
  const double x = 0.5 * rho;
  // (Gamma(x - 1/2) / Gamma(x))^2 = shift / w * (1 + excess), the expansion taken at large w.
  double up = x, shift = 1.0;
  for (; up < 11.0; up += 1.0) {
    const double factor = up / (up - 0.5);
    shift *= factor * factor;
  }
  const double w = up - 0.75;
  const double z = 1.0 / (16.0 * w * w);
  const double series =
      -1.0 / 2 +
      z * (5.0 / 4 + z * (-61.0 / 6 + z * (1385.0 / 8 + z * (-50521.0 / 10 + z * 2702765.0 / 12))));
  const double excess = std::expm1(z * series);
  if (up == x) return (x / w) * (0.25 / (x - 1.0) - excess);
  return x / (x - 1.0) - x * shift * ((1.0 + excess) / w);
}

RADAM_INLINE StepScalars step_scalars(const Hyperparameters& h, double t) {
  double decay = h.decoupled_weight_decay ? 1.0 - h.lr * h.weight_decay : 1.0;
  double step_size = h.lr / bias_correction(t, h.beta1);
  Action action = kMomentum;
  const double rho_t = rho(t, h.beta2);
  if (rho_t > h.rho_threshold) {
    action = kRectified;
    const double inf = rho_inf(h.beta2);
    const double ratio =
        h.exact ? adaptive_variance(inf) / adaptive_variance(rho_t)
                : adaptive_variance_first_order(inf) / adaptive_variance_first_order(rho_t);
    const double r_t = std::sqrt(ratio);
    step_size *= std::sqrt(bias_correction(t, h.beta2)) * (r_t < 1.0 ? r_t : 1.0);
  } else if (!h.degenerated_to_sgd) {
    action = kHold;
    step_size = 0.0;
    decay = 1.0;
  }
  const Key key = step_key(h.seed, t);
  return {h.maximize ? -h.grad_scale : h.grad_scale,
          h.decoupled_weight_decay ? 0.0 : h.weight_decay,
          decay,
          1.0 - h.beta1,
          h.beta2,
          1.0 - h.beta2,
          h.eps,
          step_size,
          static_cast<double>(action),
          static_cast<double>(key.low),
          static_cast<double>(key.high)};
}

}  // namespace radam
