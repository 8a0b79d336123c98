// The table of segments of one step, and the walk over an optimizer that fills it.
#pragma once

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "bucket.h"
#include "overlap.h"
#include "schedule.h"
#include "snapshot.h"

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

  // Adds one segment. `step` is a step tensor, or the new count itself. The tensor lies on the CPU
  // and advance() will write it, or where `capturable` beside the parameter, for the device to
  // advance. `owner` is the parameter that the user knows. Raises ValueError with the reason where
  // the tensors do not fit each other.
  void add(PyObject* param, PyObject* grad, PyObject* exp_avg, PyObject* exp_avg_sq, PyObject* step,
           int64_t group, PyObject* owner, bool capturable);

  // The first pair of segments where memory that this step writes is written or read by another.
  std::optional<Overlap> find_overlap() { return overlap_check_.find(buckets_); }

  // StepScalars of every count, from the options of its group; made once, until release(). Options
  // that no step can be made of are left to radam_kernels.schedule, which says what is wrong.
  const std::vector<StepScalars>& scalars(PyObject* groups);

  // Gives every capturable bucket the hyperparameters that its counters want.
  void read_device_groups(PyObject* groups);

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
  // What a group's options mean for all its parameters.
  struct GroupOptions {
    int state_dtype;  // a DType, or -1 for the default
    bool capturable;
  };
  struct Snapshots {
    Snapshot param, grad, exp_avg, exp_avg_sq, step;
  };
  struct Entry {
    PyObject *param, *state;  // borrowed, and only compared until the walk finds them again
    Snapshots snapshots;
  };
  struct Advance {
    void* data;
    int dtype;
    double next;
    Ref step;
  };
  static GroupOptions read_options(PyObject* group);
  bool knows(PyObject* state);
  bool collect_one(Entry& entry, PyObject* grad, int64_t group, const GroupOptions& options);
  const char* refuse(const Objects& objects, Snapshots& snapshots);
  const char* read_step(PyObject* step, bool capturable, Snapshots& snapshots);
  int64_t count_step(PyObject* step, int64_t group);
  void append(const Objects& objects, int64_t scalars, PyObject* owner);
  void append_capturable(const Objects& objects, PyObject* step, int64_t group, PyObject* owner);
  void append_to(Bucket& bucket, const Objects& objects, int64_t scalars, PyObject* owner);
  int64_t scalars_index(int64_t group, double step);
  Bucket& bucket_of(bool capturable);

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
