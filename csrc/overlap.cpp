// Sorts what a step writes and looks for neighbours that overlap. That takes longer than the rest
// of a step, so it is done again only where something has moved.
#include "overlap.h"

#include <algorithm>

namespace radam {
namespace {

const void* step_of(const Bucket& bucket, size_t i) {
  return bucket.capturable ? bucket.counters[i].step : nullptr;
}

}  // namespace

// Whether the segments write to the memory that verified_ does; or with `grads`, read it as well.
bool OverlapCheck::unchanged(const std::deque<Bucket>& buckets, bool grads) const {
  size_t i = 0;
  for (const Bucket& bucket : buckets) {
    for (size_t j = 0; j < bucket.segments.size(); ++j) {
      if (i == verified_.size()) return false;
      const Segment& s = bucket.segments[j];
      const auto& [dtypes, old, step] = verified_[i++];
      const bool same = grads ? s.grad == old.grad
                              : dtypes == bucket.dtypes && s.param == old.param &&
                                    s.exp_avg == old.exp_avg && s.exp_avg_sq == old.exp_avg_sq &&
                                    s.numel == old.numel && step == step_of(bucket, j);
      if (!same) return false;
    }
  }
  return i == verified_.size();
}

std::optional<Overlap> OverlapCheck::find(const std::deque<Bucket>& buckets) {
  const auto bytes = [](int dtype, int64_t numel) { return numel * kDTypeSizes[dtype]; };
  if (!unchanged(buckets, false)) {
    verified_.clear();
    written_.clear();
    for (const Bucket& bucket : buckets) {
      for (size_t i = 0; i < bucket.segments.size(); ++i) {
        const Segment& s = bucket.segments[i];
        const auto write = [&](const void* data, int dtype, int64_t numel, const char* stream) {
          const char* begin = static_cast<const char*>(data);
          const char* end = begin + bytes(dtype, numel);
          if (numel) written_.push_back({begin, end, bucket.owners[i], stream});
        };
        write(s.param, bucket.dtypes.param, s.numel, "param");
        write(s.exp_avg, bucket.dtypes.state, s.numel, "exp_avg");
        write(s.exp_avg_sq, bucket.dtypes.state, s.numel, "exp_avg_sq");
        if (bucket.capturable) {
          write(bucket.counters[i].step, bucket.counters[i].dtype, 1, "step");
        }
      }
    }
    std::sort(written_.begin(), written_.end(),
              [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < written_.size(); ++i) {
      const Interval &a = written_[i - 1], &b = written_[i];
      if (b.begin < a.end) return Overlap{a.owner, b.owner, a.stream, b.stream};
    }
  } else if (unchanged(buckets, true)) {
    return std::nullopt;
  }
  verified_.clear();
  for (const Bucket& bucket : buckets) {
    for (size_t i = 0; i < bucket.segments.size(); ++i) {
      const Segment& s = bucket.segments[i];
      const char* begin = static_cast<const char*>(s.grad);
      const char* end = begin + bytes(bucket.dtypes.grad, s.numel);
      // A gradient that is its own parameter is read before that element is written.
      if (s.grad == s.param && bucket.dtypes.grad == bucket.dtypes.param) continue;
      const auto after =
          std::lower_bound(written_.begin(), written_.end(), end,
                           [](const Interval& a, const char* at) { return a.begin < at; });
      if (after == written_.begin() || s.numel == 0) continue;
      const Interval& before = *(after - 1);
      if (before.end > begin) return Overlap{bucket.owners[i], before.owner, "grad", before.stream};
    }
  }
  for (const Bucket& bucket : buckets) {
    for (size_t i = 0; i < bucket.segments.size(); ++i) {
      verified_.push_back({bucket.dtypes, bucket.segments[i], step_of(bucket, i)});
    }
  }
  return std::nullopt;
}

}  // namespace radam
