// Refuses steps that would write to memory which another segment uses.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "bucket.h"

namespace radam {

struct Overlap {
  int64_t owner, other;              // where in Table::owners()
  std::string stream, other_stream;  // a field of Segment, or "step"
};

class OverlapCheck {
 public:
  // The first pair of segments found where memory that a step writes is written or read by another.
  std::optional<Overlap> find(const std::deque<Bucket>& buckets);

 private:
  struct Verified {
    DTypeSet dtypes;
    Segment segment;
    const void* step;  // null if it is not for the device to write
  };
  struct Interval {
    const char *begin, *end;
    int64_t owner;
    const char* stream;
  };

  bool unchanged(const std::deque<Bucket>& buckets, bool grads) const;

  std::vector<Verified> verified_;  // the segments last found good; written_ was made from them
  std::vector<Interval> written_;   // sorted, disjoint
};

}  // namespace radam
