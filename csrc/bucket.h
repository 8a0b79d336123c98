// The segments that one launch steps, and the tensors they lie in.
#pragma once

#include <vector>

#include "advance.h"
#include "tensor_info.h"

namespace radam {

// Held until release(): no memory of a segment can go away meanwhile.
struct Tensors {
  Ref param, grad, exp_avg, exp_avg_sq;
};

// The segments of one device and dtype set: what one launch steps.
struct Bucket {
  Bucket(const Device& device, const DTypeSet& dtypes, bool capturable)
      : device(device), dtypes(dtypes), capturable(capturable) {}
  Bucket(const Bucket&) = delete;

  const Device device;
  const DTypeSet dtypes;
  const bool capturable;  // whether the step counts are on the device too, and advance there
  std::vector<Segment> segments;
  std::vector<int64_t> owners;   // of each segment: where in Table::owners()
  std::vector<Tensors> tensors;  // of each segment

  // Only where capturable. Segment i obeys the scalars that counter i leads to.
  std::vector<Counter> counters;
  std::vector<Ref> steps;                        // the tensors that hold the counts
  std::vector<Hyperparameters> hyperparameters;  // by index of the group; zeros for other groups
  std::vector<Ref> learning_rates;               // tensors that these point into
  std::vector<StepScalars> scalars;              // where the host advances

  void release() {
    segments.clear();
    owners.clear();
    tensors.clear();
    counters.clear();
    steps.clear();
    hyperparameters.clear();
    learning_rates.clear();
    scalars.clear();
  }
};

}  // namespace radam
