// The table of segments of one step, and the walk over an optimizer that fills it.
#pragma once

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "bucket.h"
#include "overlap.h"
#include "schedule.h"

namespace radam {

// A step count that occurs in a group. Every distinct one wants StepScalars of its own.
struct Count {
  int64_t group;
  double step;  // including this step
};

class Table {
 public:
  // Empties the table, then adds every parameter of `groups` that has a gradient. Returns
  // [(group index, parameter, gradient)] of those that cannot be stepped as they stand, among them
  // those without state: Python sees to these and calls add().
  Ref collect(PyObject* groups, PyObject* state);

  // Adds one segment. `step` is a step tensor, which advance() will write, or the new count itself.
  // `owner` is the parameter that the user knows. Raises ValueError with the reason where the
  // tensors do not fit each other.
  void add(PyObject* param, PyObject* grad, PyObject* exp_avg, PyObject* exp_avg_sq, PyObject* step,
           int64_t group, PyObject* owner);

  // The first pair of segments where memory that this step writes is written or read by another.
  std::optional<Overlap> find_overlap() { return overlap_check_.find(buckets_); }

  // StepScalars of every count, from the options of its group; made once, until release(). Options
  // that no step can be made of are left to radam_kernels.schedule, which says what is wrong.
  const std::vector<StepScalars>& scalars(PyObject* groups);

  // Writes the new step counts, once the update has been launched, and lets go of every tensor.
  // Returns the list of owners.
  Ref advance();

  // Lets go of every tensor.
  void release();

  std::vector<Bucket*> buckets();
  const std::vector<Count>& counts() const { return counts_; }
  PyObject* owners() const { return owners_.get(); }  // a list

 private:
  struct Objects {
    PyObject *param, *grad, *exp_avg, *exp_avg_sq;
  };
  // Where a step tensor keeps its count: a float or a double, or nowhere.
  struct StepCell {
    void* data = nullptr;
    bool is_double = false;
  };
  struct Entry {
    PyObject *param, *state;  // borrowed, and only compared until the walk finds them again
  };
  struct Advance {
    StepCell cell;
    double next;
    Ref step;
  };
  bool knows(PyObject* state);
  bool collect_one(const Entry& entry, PyObject* grad, int64_t group, PyObject* options);
  const char* refuse(const Objects& objects);
  const char* read_step(PyObject* step, StepCell& cell);
  int64_t count_step(PyObject* step, const StepCell& cell, int64_t group);
  void append(const Objects& objects, int64_t scalars, PyObject* owner);
  int64_t scalars_index(int64_t group, double step);
  Bucket& bucket_of(const Device& device, const DTypeSet& dtypes);

  TensorInfo param_, grad_, exp_avg_, exp_avg_sq_, step_;
  std::vector<Entry> entries_;                                // one a parameter, in order
  std::vector<std::pair<PyObject*, PyObject*>> known_state_;  // the state's items, in order
  std::deque<Bucket> buckets_;
  std::vector<Count> counts_;
  std::vector<StepScalars> scalars_;
  std::vector<Advance> advances_;
  Ref owners_ = Ref::steal(PyList_New(0));
  OverlapCheck overlap_check_;
};

}  // namespace radam
