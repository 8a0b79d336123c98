// Refuses steps that would write to memory which another segment uses.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "host/bucket.h"

namespace radam {

struct Overlap {
  int64_t owner, other;              // where in Plan::owners()
  std::string stream, other_stream;  // "param", "grad", "exp_avg", "exp_avg_sq" or "step"
};

class OverlapCheck {
 public:
  // The first pair of segments found where memory that a step writes is written or read by another.
  std::optional<Overlap> find(const std::deque<Bucket>& buckets);

 private:
  struct Verified {
    DTypeSet dtypes;
    Segment segment;
    const void* step;
    const void* grad;
    size_t after;  // the first interval in written_ behind the gradient
  };
  struct Interval {
    const char *begin, *end;
    int64_t owner;
    const char* stream;
  };

  bool same_writes(const std::deque<Bucket>& buckets) const;
  std::optional<Overlap> sort_writes(const std::deque<Bucket>& buckets);

  std::vector<Verified> verified_;  // the segments last found good; written_ was made from them
  std::vector<Interval> written_;   // sorted, disjoint
};

}  // namespace radam
