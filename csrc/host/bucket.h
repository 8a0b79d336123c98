// The segments that one launch steps, and all that the launch needs.
#pragma once

#include <vector>

#include "core/advance.h"
#include "core/segment.h"
#include "host/tensor.h"

namespace radam {

// Held until release(): no memory of a segment can go away meanwhile. `step` is empty where the
// caller counts.
struct Tensors {
  Ref param, grad, exp_avg, exp_avg_sq, step;
};

// A step count that occurs in a group. Every distinct one has StepScalars of its own.
struct Count {
  int64_t group;
  double step;  // including this step
};

// The segments of one device and dtype set: what one launch steps. A bucket lives as long as its
// plan, so that `cache` does.
struct Bucket {
  Bucket(const Device& device, const DTypeSet& dtypes, bool capturable)
      : device(device), dtypes(dtypes), capturable(capturable) {}
  Bucket(const Bucket&) = delete;

  const Device device;
  const DTypeSet dtypes;
  const bool capturable;  // whether the step counts are on the device too, and advance there
  std::vector<Segment> segments;

  // Of each segment:
  std::vector<const void*> grads;
  std::vector<int64_t> owners;  // where in Plan::owners()
  std::vector<Tensors> tensors;
  std::vector<Counter> counters;  // where its step count is; null where the caller counts

  // Of each row that segments point to: where the host counts, of each count; where the device
  // does, of each segment, and made by the device (or by the host, for a device that is the CPU).
  std::vector<Count> counts;
  std::vector<StepScalars> scalars;

  // Only where capturable.
  std::vector<Hyperparameters> hyperparameters;  // by index of the group; zeros for other groups
  std::vector<Ref> learning_rates;               // tensors that these point into
  float grad_scale = 1, found_inf = 0;           // GradScaler's, read where the device is the CPU

  Ref groups;   // the parameter groups that were planned, a sequence of dicts
  Ref scaling;  // radam_kernels.scaling.Scaling
  Ref cache;    // what the backend keeps from step to step: tables on a device

  Segments table() const {
    return {segments.data(), grads.data(), static_cast<int64_t>(segments.size())};
  }

  void release() {
    segments.clear();
    grads.clear();
    owners.clear();
    tensors.clear();
    counters.clear();
    counts.clear();
    scalars.clear();
    hyperparameters.clear();
    learning_rates.clear();
    groups = Ref();
    scaling = Ref();
  }
};

}  // namespace radam
