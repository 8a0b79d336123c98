// Selects the instruction set and divides the elements of a step among threads.
#include <algorithm>

#include "cpu/step_cpu.h"
#include "cpu/threads.h"

namespace radam {

#define RADAM_DECLARE(isa)                                                \
  void step_range_##isa(const Segments& segments, const DTypeSet& dtypes, \
                        const StepScalars* scalars, int64_t first, int64_t last);
RADAM_DECLARE(baseline)
#ifdef RADAM_X86_LEVELS
RADAM_DECLARE(v3)
RADAM_DECLARE(v4)
#endif
#undef RADAM_DECLARE

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef RADAM_X86_LEVELS
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) found.push_back({"x86-64-v4", step_range_v4});
    if (v3) found.push_back({"x86-64-v3", step_range_v3});
#endif
    found.push_back({"baseline", step_range_baseline});
    return found;
  }();
  return sets;
}

namespace {

// One thread for every so many elements: for fewer, waking another costs more than it saves.
constexpr int64_t kGrain = 8192;
// Ranges start on a multiple of this, so that two threads seldom share a cache line.
constexpr int64_t kLine = 64;

}  // namespace

void step_cpu(const Segments& segments, const DTypeSet& dtypes, const StepScalars* scalars,
              int threads, const InstructionSet& isa) {
  int64_t total = 0;
  for (int64_t i = 0; i < segments.count; ++i) total += segments.rows[i].numel;
  const int wanted = static_cast<int>(std::min<int64_t>(threads, (total + kGrain - 1) / kGrain));

  parallel(wanted, [&](int thread, int team) {
    const int64_t share = (total / team + kLine) / kLine * kLine;
    const int64_t first = std::min(total, thread * share);
    const int64_t last = thread + 1 == team ? total : std::min(total, first + share);
    if (first < last) isa.step_range(segments, dtypes, scalars, first, last);
  });
}

}  // namespace radam
