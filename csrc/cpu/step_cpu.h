// The interface of the CPU kernel: one function for each instruction set, and the launcher.
#pragma once

#include <vector>

#include "core/segment.h"

namespace radam {

// Steps elements [first, last), counted through all segments.
using StepRange = void (*)(const Segments& segments, const DTypeSet& dtypes,
                           const StepScalars* scalars, int64_t first, int64_t last);

struct InstructionSet {
  const char* name;
  StepRange step_range;
};

// The instruction sets that this processor supports, best first.
const std::vector<InstructionSet>& instruction_sets();

// Steps every segment on at most `threads` threads, which share the elements evenly.
void step_cpu(const Segments& segments, const DTypeSet& dtypes, const StepScalars* scalars,
              int threads, const InstructionSet& isa);

}  // namespace radam
