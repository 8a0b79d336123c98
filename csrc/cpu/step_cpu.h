// The interface of the CPU kernels: functions for each instruction set, and their launchers.
#pragma once

#include <vector>

#include "core/norm.h"
#include "core/segment.h"

namespace radam {

// Steps elements [first, last), counted through all segments.
using StepRange = void (*)(const Segments& segments, const DTypeSet& dtypes,
                           const StepScalars* scalars, int64_t first, int64_t last);

// The sum or the maximum that a Norm is, for `numel` consecutive elements.
using PartialNorm = double (*)(const void* data, int64_t numel, DType dtype, Norm norm);

struct InstructionSet {
  const char* name;
  StepRange step_range;
  PartialNorm partial_norm;
};

// The instruction sets that this processor supports, best first.
const std::vector<InstructionSet>& instruction_sets();

// Steps every segment on at most `threads` threads, which share the elements evenly.
void step_cpu(const Segments& segments, const DTypeSet& dtypes, const StepScalars* scalars,
              int threads, const InstructionSet& isa);

// The sum or the maximum over all rows. The same bits for any number of threads: each chunk of a
// row has a sum of its own, and these are added in order.
double norm_cpu(const std::vector<GradientRow>& rows, DType dtype, Norm norm, int threads,
                const InstructionSet& isa);

}  // namespace radam
