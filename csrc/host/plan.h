// The plan of one step: the walk over an optimizer's parameters, and the buckets that it fills.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "host/bucket.h"
#include "host/options.h"
#include "host/overlap.h"

namespace radam {

// Thrown for tensors that can't be stepped together. Python replaces "{0}" and "{1}" in `message`
// by the names of these owners.
struct Refusal {
  std::string message;
  std::vector<int64_t> owners;
};

// Thrown for a group with invalid options. explain() in radam_kernels/launch.py finds the reason.
struct InvalidGroup {
  int64_t group;
  double step;
};

// Implemented in walk.cpp (refresh), check.cpp (add_row) and plan.cpp (buckets and the step).
class Plan {
 public:
  // Plans the step of every parameter of `groups` that has a gradient. `state` is the optimizer's,
  // `scaling` a radam_kernels.scaling.Scaling. `repaired` maps ids of parameters to replacements:
  // tuples of the owner and what takes the place of each Stream, or None. `first_ordinal` is the
  // place of the first parameter among all of the optimizer.
  //
  // Returns [(group, parameter, gradient, reason)] for parameters that can't be stepped as they
  // are, including those without state. Unless this list is empty there is no plan yet: Python
  // makes state or replacements for them, and calls again. Throws Refusal or InvalidGroup.
  //
  // Other threads, and Python code that torch calls, can change all of this during the walk. So the
  // lists of parameters and the items of the state are copied at the beginning, and the walk owns
  // a reference to everything that it reads.
  Ref refresh(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* scaling,
              uint32_t first_ordinal);

  // Like refresh(), for tensors whose steps the caller counts. The moments may have any supported
  // dtype, but no format for low memory.
  Ref refresh_tensors(PyObject* params, PyObject* grads, PyObject* exp_avgs, PyObject* exp_avg_sqs,
                      double step, PyObject* group, PyObject* scaling);

  // Steps one parameter of `group`, if it has a gradient and can be stepped as it is, on the CPU.
  // `state` is its own, `ordinal` its place among all parameters. False if not: nothing has changed
  // then, and refresh() has the reason. For the hooks of step_in_backward(), whose overhead counts
  // for each parameter.
  bool step_parameter(PyObject* group, PyObject* param, PyObject* state, PyObject* scaling,
                      int threads, uint32_t ordinal);

  // Bumps the version counters of the tensors, so that backward through a stale graph raises
  // instead of giving wrong gradients. From here on memory is written.
  void begin();

  // Steps one bucket, which must be on the CPU. Advances its step counts if it is capturable.
  static void run_bucket(Bucket& bucket, int threads);

  // Writes the step counts of the buckets that are not capturable.
  void commit();

  // begin(), every bucket and commit() in one call, so that no signal handler runs between them.
  // All buckets must be on the CPU.
  void run_cpu(int threads);

  // Drops all references to tensors.
  void release();

  bool begun() const { return begun_; }
  bool on_cpu() const;  // whether it has buckets, and all are on the CPU
  std::vector<Bucket*> buckets();
  const std::vector<Ref>& owners() const { return owners_; }
  Ref groups() const;  // a list of the groups that refresh() has read

 private:
  // Addresses of a tensor at the last step. Compared and prefetched, but never dereferenced.
  struct Seen {
    const PyObject* object = nullptr;
    const void* impl = nullptr;  // the sizes in torch's C++ object
    const char* data = nullptr;
  };
  struct LowMemoryEntry {
    Seen seen[kStreams - kPlainStreams];
    // Of a DTensor: its spec, and which elements of the whole parameter it has.
    Ref spec = {};
    uint64_t first_index = 0;
    uint32_t shard = 0;
  };
  struct Entry {
    size_t item = 0;  // index of its state in items_
    Seen seen[kPlainStreams];
    uint32_t ordinal = 0;  // the parameter's place among all of the optimizer
    std::unique_ptr<LowMemoryEntry> low_memory = {};  // once there was a use for it
  };
  struct Group {
    Ref options;
    FormatOptions formats = {};
    bool capturable = false;
    Ref params = {};             // a tuple
    bool caller_counts = false;  // whether the caller counts the steps
    bool has_host = false;
    Hyperparameters host{};
  };
  // Why a row can't be stepped: the name of the tensor concerned, or "", and a message to follow
  // it. Two literals, so that no string is built for the many rows without a reason.
  struct Reason {
    const char* text = nullptr;
    const char* stream = "";
    explicit operator bool() const { return text; }
  };

  void start();
  void walk(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* pending,
            uint32_t first_ordinal);
  void add_group(PyObject* options);
  PyObject* find_state(PyObject* param, Entry& entry);
  bool find_replacement(PyObject* repaired, PyObject* owner);
  bool find_row(PyObject* state);
  void prefetch(size_t position) const;
  static void prefetch_keys(const void* keys);
  static void prefetch_tensors(const Entry& entry);
  size_t visit(PyObject* param, PyObject* state);
  Reason add_row(const Ref& owner, int64_t group, Entry& entry);
  Reason use_local_tensors();
  Reason check(const Group& group, Entry& entry);
  Reason check_low_memory(Entry& entry);
  bool is_remainder(const TensorInfo& info) const;
  bool is_exponents(const TensorInfo& info) const;
  static void locate_shard(PyObject* owner, LowMemoryEntry& entry);
  Reason check_memory(int stream, Seen& seen) const;
  Reason check_step(const Group& group, Seen& seen);
  void append(const Ref& owner, int64_t group, const Entry& entry);
  Bucket& bucket_of(bool capturable);
  int64_t scalars_index(Bucket& bucket, int64_t group, double step) const;
  void complete(PyObject* groups, PyObject* scaling);
  void make_scalars(Bucket& bucket);
  void read_device_groups(Bucket& bucket, PyObject* scaling);

  // The row that is being checked. Owned, because describing a tensor can release the GIL.
  std::array<Ref, kStreams> row_;
  TensorInfo infos_[kStreams];
  DTypeSet dtypes_{};
  std::vector<Entry> entries_;  // one for each parameter, in order
  // The items of the state at the beginning of the walk; the keys are only compared. item_of_ is an
  // index from key to item, made only if a parameter's item is not where it was at the last step.
  std::vector<std::pair<PyObject*, Ref>> items_;
  std::unordered_map<PyObject*, size_t> item_of_;
  // What step_parameter() saw, in the order of backward. Addresses are compared and prefetched, but
  // never dereferenced.
  struct Visit {
    const PyObject* param;
    const PyObject* state = nullptr;
    const void* keys = nullptr;  // of the state, a dict
    Entry entry = {};
  };
  std::vector<Visit> visits_;
  std::unordered_map<const PyObject*, size_t> visit_of_;  // by parameter
  size_t next_ = 0;                                       // the position that is expected
  std::vector<Group> groups_;
  std::deque<Bucket> buckets_;
  std::vector<Ref> owners_;
  std::vector<Ref> written_;  // further tensors whose version counters begin() bumps
  OverlapCheck overlap_check_;
  double count_ = 0;  // the caller's step count, for refresh_tensors()
  bool begun_ = false;
};

}  // namespace radam
