// Sorts the intervals that a step writes and compares neighbours. Sorting takes longer than the
// rest of a step, so the sorted intervals are cached until one of them changes. A gradient that has
// moved is compared with the neighbours of its last address first.
#include "host/overlap.h"

#include <algorithm>

namespace radam {

namespace {

LowMemory low_memory(const Bucket& bucket, size_t i) {
  return bucket.low_memory.empty() ? LowMemory{} : bucket.low_memory[i];
}

bool same_pointers(const LowMemory& a, const LowMemory& b) {
  return a.remainder == b.remainder && a.exp_avg_exponent == b.exp_avg_exponent &&
         a.exp_avg_sq_exponent == b.exp_avg_sq_exponent;
}

}  // namespace

bool OverlapCheck::same_writes(const std::deque<Bucket>& buckets) const {
  size_t i = 0;
  for (const Bucket& bucket : buckets) {
    for (size_t j = 0; j < bucket.segments.size(); ++j) {
      if (i == verified_.size()) return false;
      const Segment& s = bucket.segments[j];
      const Verified& old = verified_[i++];
      if (!(old.dtypes == bucket.dtypes && s.param == old.segment.param &&
            s.exp_avg == old.segment.exp_avg && s.exp_avg_sq == old.segment.exp_avg_sq &&
            s.numel == old.segment.numel && old.step == bucket.counters[j].step &&
            same_pointers(low_memory(bucket, j), old.low_memory))) {
        return false;
      }
    }
  }
  return i == verified_.size();
}

// Rebuilds written_ and verified_, without gradients.
std::optional<Overlap> OverlapCheck::sort_writes(const std::deque<Bucket>& buckets) {
  verified_.clear();
  written_.clear();
  for (const Bucket& bucket : buckets) {
    for (size_t i = 0; i < bucket.segments.size(); ++i) {
      const Segment& s = bucket.segments[i];
      const Counter& counter = bucket.counters[i];
      const LowMemory& extra = low_memory(bucket, i);
      const auto write = [&](const void* data, int64_t size, const char* stream) {
        const char* begin = static_cast<const char*>(data);
        if (begin && size) written_.push_back({begin, begin + size, bucket.owners[i], stream});
      };
      const int64_t state_size = s.numel * kDTypeSizes[bucket.dtypes.state];
      const int64_t blocks = (s.numel + kBlock - 1) / kBlock;
      write(s.param, s.numel * kDTypeSizes[bucket.dtypes.param], "param");
      write(s.exp_avg, state_size, "exp_avg");
      write(s.exp_avg_sq, state_size, "exp_avg_sq");
      write(counter.step, kDTypeSizes[counter.dtype], "step");
      write(extra.remainder, s.numel * (bucket.dtypes.param == kMaster24 ? 1 : 2),
            "param_remainder");
      write(extra.exp_avg_exponent, blocks, "exp_avg_exponent");
      write(extra.exp_avg_sq_exponent, blocks, "exp_avg_sq_exponent");
      verified_.push_back({bucket.dtypes, s, extra, counter.step, nullptr, 0});
    }
  }
  std::sort(written_.begin(), written_.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written_.size(); ++i) {
    const Interval &a = written_[i - 1], &b = written_[i];
    if (b.begin < a.end) {
      verified_.clear();
      return Overlap{a.owner, b.owner, a.stream, b.stream};
    }
  }
  return std::nullopt;
}

std::optional<Overlap> OverlapCheck::find(const std::deque<Bucket>& buckets) {
  if (!same_writes(buckets)) {
    if (auto found = sort_writes(buckets)) return found;
  }
  size_t i = 0;
  for (const Bucket& bucket : buckets) {
    for (size_t j = 0; j < bucket.segments.size(); ++j) {
      const Segment& s = bucket.segments[j];
      Verified& verified = verified_[i++];
      const void* grad = bucket.grads[j];
      if (grad == verified.grad) continue;
      const char* begin = static_cast<const char*>(grad);
      const char* end = begin + s.numel * kDTypeSizes[bucket.dtypes.grad];
      // A gradient may alias its own parameter: every element is read before it is written.
      const bool own = grad == s.param && bucket.dtypes.grad == weight_dtype(bucket.dtypes.param);
      if (s.numel != 0 && !own) {
        const auto fits = [&](size_t after) {
          return (after == 0 || written_[after - 1].end <= begin) &&
                 (after == written_.size() || end <= written_[after].begin);
        };
        if (!fits(verified.after)) {
          const auto after =
              std::lower_bound(written_.begin(), written_.end(), end,
                               [](const Interval& a, const char* at) { return a.begin < at; });
          verified.after = static_cast<size_t>(after - written_.begin());
          if (!fits(verified.after)) {
            const Interval& before = *(after - 1);
            return Overlap{bucket.owners[j], before.owner, "grad", before.stream};
          }
        }
      }
      verified.grad = grad;
    }
  }
  return std::nullopt;
}

}  // namespace radam
