// Detects memory that a step writes and that another segment uses.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "host/bucket.h"

namespace radam {

struct Overlap {
  int64_t owner, other;              // indices in Plan::owners()
  std::string stream, other_stream;  // "param", "grad", "exp_avg", "exp_avg_sq" or "step"
};

class OverlapCheck {
 public:
  // A pair of segments of which one writes memory that the other reads or writes, if there is one.
  std::optional<Overlap> find(const std::deque<Bucket>& buckets);

 private:
  struct Verified {
    DTypeSet dtypes;
    Segment segment;
    LowMemory low_memory;
    const void* step;
    const void* grad;
    size_t after;  // index of the first interval in written_ after the gradient
  };
  struct Interval {
    const char *begin, *end;
    int64_t owner;
    const char* stream;
  };

  bool same_writes(const std::deque<Bucket>& buckets) const;
  std::optional<Overlap> sort_writes(const std::deque<Bucket>& buckets);

  std::vector<Verified> verified_;  // the segments that passed last; written_ is made from them
  std::vector<Interval> written_;   // sorted, disjoint
};

}  // namespace radam
