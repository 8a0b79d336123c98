// What the loops of the CPU kernel share: the arguments of the update, and prefetching.
#pragma once

#include "core/update.h"
#include "cpu/lanes.h"

namespace radam {
namespace {

constexpr int kLine = 64;    // bytes of a cache line
constexpr int kAhead = 512;  // bytes to prefetch ahead: hardware prefetch stops at each page's end

template <int kBytes>
RADAM_INLINE void prefetch(const char* at) {
  for (int i = 0; i < kBytes; i += kLine) __builtin_prefetch(at + kAhead + i);
}

// What is the same for all elements of a segment.
template <typename T>
struct UpdateArgs {
  Scalars<Lanes<T>, Factor<T>> scalars;
  bool l2;
  Action action;

  explicit UpdateArgs(const StepScalars& s)
      : scalars(s), l2(static_cast<T>(s.weight_decay) != 0), action(action_of(s)) {}
};

}  // namespace
}  // namespace radam
