// The plan of one step: the walk over an optimizer's parameters, and the buckets that it fills.
#pragma once

#include <deque>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "host/bucket.h"
#include "host/options.h"
#include "host/overlap.h"

namespace radam {

// Thrown for tensors that can't be stepped together. `message` has "{0}" and "{1}" for the names of
// these owners, which Python knows.
struct Refusal {
  std::string message;
  std::vector<int64_t> owners;
};

// Thrown for a group whose options no step can be made of; radam_kernels.schedule says why.
struct InvalidGroup {
  int64_t group;
  double step;
};

// What a parameter is stepped with, in the order of a plan's tables.
enum Stream { kParam, kGrad, kExpAvg, kExpAvgSq, kStep, kStreams };

// Implemented in walk.cpp (refresh), check.cpp (take) and plan.cpp (buckets and the step).
class Plan {
 public:
  // Plans the step of every parameter of `groups` that has a gradient. `state` is the optimizer's,
  // `scaling` a radam_kernels.scaling.Scaling. `repaired` is a dict from ids of parameters to what
  // is stepped in their place: tuples (owner, param, grad, exp_avg, exp_avg_sq, step).
  //
  // Returns [(group, parameter, gradient, reason)] of those that can't be stepped as they are,
  // among them those without state. Unless that is empty there is no plan yet: Python makes state
  // or replacements for these, and calls again. Throws Refusal or InvalidGroup.
  //
  // Other threads, and code that torch calls, may edit all of this meanwhile. So the lists of
  // parameters and the state's items are taken once, at the beginning, and all that is read is
  // owned.
  Ref refresh(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* scaling);

  // As refresh(), of tensors whose steps the caller counts; any supported dtype of the moments.
  Ref refresh_tensors(PyObject* params, PyObject* grads, PyObject* exp_avgs, PyObject* exp_avg_sqs,
                      double step, PyObject* group);

  // Tells autograd of the write, so that a stale graph raises instead of giving wrong gradients;
  // from here on memory is written.
  void begin();

  // Steps one bucket, which must be on the CPU; advances its counts if it is capturable.
  static void run_bucket(Bucket& bucket, int threads);

  // Writes the step counts that the host keeps. begin(), the buckets and this are the whole step.
  void commit();

  // All of that in one call, so that no signal comes between; all buckets must be on the CPU.
  void run_cpu(int threads);

  // Lets go of every tensor.
  void release();

  bool begun() const { return begun_; }
  std::vector<Bucket*> buckets();
  const std::vector<Ref>& owners() const { return owners_; }
  Ref groups() const;  // a list of the groups that refresh() has read

 private:
  // Where a tensor was found at the last step. Only compared and prefetched, never followed.
  struct Seen {
    const PyObject* object = nullptr;
    const void* impl = nullptr;  // in torch's C++ object: where its sizes are
    const char* data = nullptr;
  };
  struct Entry {
    size_t item = 0;  // where in items_ its state was
    Seen seen[kStreams];
  };
  struct Group {
    Ref options;
    int state_dtype;  // a DType, or -1 for the default
    bool capturable;
    Ref params = {};       // a tuple
    bool counted = false;  // by the caller
    bool has_host = false;
    Hyperparameters host{};
  };
  // Why a row can't be stepped: a sentence, after the name of the stream that it is about, if any.
  // Built of literals, because most rows have none.
  struct Reason {
    const char* text = nullptr;
    const char* stream = "";
    explicit operator bool() const { return text; }
  };

  void walk(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* pending);
  void add_group(PyObject* options);
  PyObject* find_state(PyObject* param, Entry& entry);
  bool find_replacement(PyObject* repaired, PyObject* owner);
  bool find_row(PyObject* state);
  void prefetch(size_t position) const;
  Reason take(const Ref& owner, int64_t group, Entry& entry);
  Reason use_local_tensors();
  Reason check(Entry& entry);
  Reason check_memory(int stream, Seen& seen) const;
  Reason check_step(const Group& group, Seen& seen);
  void append(const Ref& owner, int64_t group);
  Bucket& bucket_of(bool capturable);
  int64_t scalars_index(Bucket& bucket, int64_t group, double step) const;
  void complete(PyObject* groups, PyObject* scaling);
  void make_scalars(Bucket& bucket);
  void read_device_groups(Bucket& bucket, PyObject* scaling);

  // The row that is being looked at. Owned: describing tensors can let other threads run.
  Tensors row_;
  TensorInfo infos_[kStreams];
  std::vector<Entry> entries_;  // one a parameter, in order
  // The state's items at the beginning of the walk, the keys only to be compared; and where a
  // parameter is among them if it is not where it was.
  std::vector<std::pair<PyObject*, Ref>> items_;
  std::unordered_map<PyObject*, size_t> item_of_;
  std::vector<Group> groups_;
  std::deque<Bucket> buckets_;
  std::vector<Ref> owners_;
  std::vector<Ref> written_;  // tensors whose version goes up beside the owners'
  OverlapCheck overlap_check_;
  double count_ = 0;  // of refresh_tensors
  bool begun_ = false;
};

}  // namespace radam
