// The CPU kernel's interface: one function per instruction set, and the launcher that picks one.
#pragma once

#include <vector>

#include "core/segment.h"

namespace radam {

// Steps elements [first, last) of all the elements of the segments, counted one after another.
using StepRange = void (*)(const Segments& segments, const DTypeSet& dtypes,
                           const StepScalars* scalars, int64_t first, int64_t last);

struct InstructionSet {
  const char* name;
  StepRange step_range;
};

// The instruction sets that this processor runs, best first.
const std::vector<InstructionSet>& instruction_sets();

// Steps every segment on at most `threads` threads, divided by elements and not by segment.
void step_cpu(const Segments& segments, const DTypeSet& dtypes, const StepScalars* scalars,
              int threads, const InstructionSet& isa);

}  // namespace radam
