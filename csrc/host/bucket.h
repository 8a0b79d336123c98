// The segments that one launch steps, and everything else that the launch needs.
#pragma once

#include <array>
#include <vector>

#include "core/advance.h"
#include "core/segment.h"
#include "host/tensor.h"

namespace radam {

// The tensors that a step of one parameter uses: four of the same shape, the step count, and what
// formats for low memory have in addition.
enum Stream {
  kParam,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kStep,
  kPlainStreams,  // the number of those above
  kRemainder = kPlainStreams,
  kExpAvgExponent,
  kExpAvgSqExponent,
  kStreams
};

// References that keep the memory of a segment alive until release(): the step is empty if the
// caller counts the steps, and each of LowMemoryTensors if the format has none.
using Tensors = std::array<Ref, kPlainStreams>;
using LowMemoryTensors = std::array<Ref, kStreams - kPlainStreams>;

// A step count that occurs in a group. Each distinct one has one row of StepScalars.
struct Count {
  int64_t group;
  double step;  // including this step
};

// The segments of one device and dtype set. A bucket lives as long as its plan, so `cache` is kept
// between steps.
struct Bucket {
  Bucket(const Device& device, const DTypeSet& dtypes, bool capturable)
      : device(device), dtypes(dtypes), capturable(capturable) {}
  Bucket(const Bucket&) = delete;

  const Device device;
  const DTypeSet dtypes;
  const bool capturable;  // whether the step counts are stored and advanced on the device
  std::vector<Segment> segments;

  // One entry for each segment (low_memory and its tensors: if the formats are for low memory):
  std::vector<const void*> grads;
  std::vector<int64_t> owners;  // indices in Plan::owners()
  std::vector<Tensors> tensors;
  std::vector<Counter> counters;  // with a null address if the caller counts the steps
  std::vector<LowMemory> low_memory;
  std::vector<LowMemoryTensors> low_memory_tensors;

  // The rows that Segment::scalars indexes. The host makes one for each count. If capturable, the
  // device makes one for each segment, and they are here only if that device is the CPU.
  std::vector<Count> counts;
  std::vector<StepScalars> scalars;

  // Capturable only:
  std::vector<Hyperparameters> hyperparameters;  // by group index; zeros for groups not in here
  std::vector<Ref> learning_rates;               // the tensors that lr_data points into
  float grad_scale = 1, found_inf = 0;           // GradScaler's values, if the device is the CPU

  double grad_factor = 1;  // the value of Scaling.factor, if the device is the CPU
  Ref groups;              // the parameter groups of the plan, a sequence of dicts
  Ref scaling;             // radam_kernels.scaling.Scaling
  Ref cache;               // of the backend, kept between steps: tables on a device

  Segments table() const {
    return {segments.data(), grads.data(), low_memory.empty() ? nullptr : low_memory.data(),
            static_cast<int64_t>(segments.size())};
  }

  void release() {
    segments.clear();
    grads.clear();
    owners.clear();
    tensors.clear();
    counters.clear();
    low_memory.clear();
    low_memory_tensors.clear();
    counts.clear();
    scalars.clear();
    hyperparameters.clear();
    learning_rates.clear();
    groups = Ref();
    scaling = Ref();
  }
};

}  // namespace radam
