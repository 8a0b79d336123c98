// The gradients of an optimizer, for their norm.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "core/norm.h"
#include "host/tensor.h"

namespace radam {

// param.grad, without a lookup in every base class where that is possible.
Ref gradient(PyObject* param);

// A copy of a list, or of any other iterable; `message` is for a TypeError.
Ref as_tuple(PyObject* object, const char* message);

// The gradients of one device, dtype and placement. It lives as long as its Gradients, so `cache`
// is kept between steps.
struct GradientBucket {
  Device device{};
  DType dtype = kFloat32;
  bool complex = false;  // then `dtype` is that of each part, and rows have pairs
  Ref mesh, placements;  // of DTensors; empty for plain tensors

  // One entry for each gradient:
  std::vector<Gradient> rows;
  std::vector<Ref> owners;   // the parameters
  std::vector<Ref> grads;    // as their owner has them
  std::vector<Ref> tensors;  // the memory in `rows`: the local tensors of DTensors

  Ref cache;  // of the backend: tables on a device

  // The sum of |g|^norm_type over all rows, or the largest |g|; norm_type is 1, 2 or inf. The rows
  // must be on the CPU. `isa` is an index of instruction_sets(). Releases the GIL.
  double power_sum(double norm_type, int threads, int isa) const;
};

class Gradients {
 public:
  // How the gradients of an optimizer compare with those that refresh() read.
  struct Comparison {
    int64_t same = 0, replaced = 0;
    Ref changed;  // a parameter whose gradient was written to in place; or empty
  };

  // Reads the gradient of every parameter of `groups`, and remembers them. `replaced` maps ids of
  // parameters to pairs: a gradient, and the dense local tensor to read for it.
  //
  // Returns [(parameter, gradient, reason)] for gradients whose memory can't be read as it is.
  // Python makes replacements for these, and calls again.
  Ref refresh(PyObject* groups, PyObject* replaced);

  // Gradients are recognized by weak references, as addresses are used again, and by their version
  // counters.
  Comparison compare(PyObject* groups) const;

  // In the order of their first gradients.
  const std::vector<GradientBucket*>& buckets() const { return filled_; }

  // Drops the references to all tensors, but for the weak ones that compare() needs.
  void release();

 private:
  struct Mark {
    Ref weak;
    int64_t version;
  };

  const char* add(const Ref& owner, const Ref& grad, const Ref& local);
  GradientBucket& bucket_of(const TensorInfo& info, const Ref& spec);

  std::deque<GradientBucket> buckets_;  // a deque, because filled_ has their addresses
  std::vector<GradientBucket*> filled_;
  std::vector<Mark> marks_;  // one for each parameter, in order; empty without a gradient
  TensorInfo info_;
};

}  // namespace radam
