// The CPU kernel's interface: one function per instruction set, and the launcher that picks one.
#pragma once

#include <vector>

#include "step.h"

namespace radam {

// Steps elements [begin, end) of a segment.
using StepRange = void (*)(const Segment& segment, const DTypeSet& dtypes, int64_t begin,
                           int64_t end, const StepScalars& scalars);

struct InstructionSet {
  const char* name;
  StepRange step_range;
};

// The instruction sets that this processor runs, best first.
const std::vector<InstructionSet>& instruction_sets();

// Steps every segment on at most `threads` threads, divided by elements and not by segment.
void step_cpu(const Segment* segments, int64_t count, const DTypeSet& dtypes,
              const StepScalars* scalars, int threads, const InstructionSet& isa);

}  // namespace radam
