// The segments that one launch steps, and the tensors they lie in.
#pragma once

#include <vector>

#include "tensor_info.h"

namespace radam {

// Held until release(): no memory of a segment can go away meanwhile.
struct Tensors {
  Ref param, grad, exp_avg, exp_avg_sq;
};

// The segments of one device and dtype set: what one launch steps.
struct Bucket {
  Bucket(const Device& device, const DTypeSet& dtypes) : device(device), dtypes(dtypes) {}
  Bucket(const Bucket&) = delete;

  const Device device;
  const DTypeSet dtypes;
  std::vector<Segment> segments;
  std::vector<int64_t> owners;   // of each segment: where in Table::owners()
  std::vector<Tensors> tensors;  // of each segment
};

}  // namespace radam
