// Selects the instruction set and divides the elements of a step among threads.
#include <algorithm>

#include "cpu/step_cpu.h"
#include "cpu/threads.h"

namespace radam {

#define RADAM_DECLARE(isa)                                                        \
  void step_range_##isa(const Segments& segments, const DTypeSet& dtypes,         \
                        const StepScalars* scalars, int64_t first, int64_t last); \
  double partial_norm_##isa(const void* data, int64_t numel, DType dtype, Norm norm);
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
    if (v4) found.push_back({"x86-64-v4", step_range_v4, partial_norm_v4});
    if (v3) found.push_back({"x86-64-v3", step_range_v3, partial_norm_v3});
#endif
    found.push_back({"baseline", step_range_baseline, partial_norm_baseline});
    return found;
  }();
  return sets;
}

namespace {

// One thread for every so many elements: for fewer, waking another costs more than it saves.
constexpr int64_t kGrain = 8192;
// Ranges start on a multiple of this, so that two threads seldom share a cache line.
constexpr int64_t kLine = 64;
// Elements of a row that have a sum of their own.
constexpr int64_t kNormChunk = 1 << 16;

int64_t chunks(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

int threads_for(int64_t elements, int most) {
  return static_cast<int>(std::min<int64_t>(most, (elements + kGrain - 1) / kGrain));
}

}  // namespace

void step_cpu(const Segments& segments, const DTypeSet& dtypes, const StepScalars* scalars,
              int threads, const InstructionSet& isa) {
  int64_t total = 0;
  for (int64_t i = 0; i < segments.count; ++i) total += segments.rows[i].numel;

  parallel(threads_for(total, threads), [&](int thread, int team) {
    const int64_t share = (total / team + kLine) / kLine * kLine;
    const int64_t first = std::min(total, thread * share);
    const int64_t last = thread + 1 == team ? total : std::min(total, first + share);
    if (first < last) isa.step_range(segments, dtypes, scalars, first, last);
  });
}

double norm_cpu(const std::vector<GradientRow>& rows, DType dtype, Norm norm, int threads,
                const InstructionSet& isa) {
  int64_t total = 0, count = 0;
  for (const GradientRow& row : rows) {
    total += row.numel;
    count += chunks(row.numel);
  }
  std::vector<double> partials(static_cast<size_t>(count));

  parallel(threads_for(total, threads), [&](int thread, int team) {
    // Each thread takes the chunks that begin in its share of the elements.
    const int64_t first = total / team * thread;
    const int64_t last = thread + 1 == team ? total : total / team * (thread + 1);
    int64_t offset = 0;
    double* partial = partials.data();
    for (const GradientRow& row : rows) {
      for (int64_t begin = 0; begin < row.numel; begin += kNormChunk, ++partial) {
        if (offset + begin < first || offset + begin >= last) continue;
        const char* const data = static_cast<const char*>(row.data) + begin * kDTypeSizes[dtype];
        *partial = isa.partial_norm(data, std::min(kNormChunk, row.numel - begin), dtype, norm);
      }
      offset += row.numel;
    }
  });

  double result = 0;
  for (const double partial : partials) {
    if (norm != kLargestMagnitude) {
      result += partial;
    } else if (partial > result || partial != partial) {  // keeps NaN
      result = partial;
    }
  }
  return result;
}

}  // namespace radam
