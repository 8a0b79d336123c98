// Everything a step must know is read anew at every step, in one pass: what people edit between
// steps (gradients, pointers, state, step counts) needs no detection, and nothing can go stale.
#include "table.h"

#include <algorithm>
#include <stdexcept>

namespace radam {
namespace {

// Names that are looked up for every parameter, interned once and never released.
struct Names {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* state_dtype = PyUnicode_InternFromString("state_dtype");
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* exp_avg = PyUnicode_InternFromString("exp_avg");
  PyObject* exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq");
};

const Names& names() {
  static const Names interned;
  return interned;
}

// A borrowed item of a dict, or null.
PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw PythonError();
  return found;
}

// A lazily negated tensor (the imaginary part of a conjugate) holds the wrong signs in memory.
bool is_negated(PyObject* tensor) {
  const Ref result = Ref::steal(PyObject_CallMethodNoArgs(tensor, names().is_neg));
  return result.get() != Py_False;
}

}  // namespace

bool Table::knows(PyObject* state) {
  bool same = known_state_.size() == static_cast<size_t>(PyDict_Size(state));
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (size_t i = 0; same && PyDict_Next(state, &position, &key, &value); ++i) {
    same = known_state_[i].first == key && known_state_[i].second == value;
  }
  if (same) return true;
  known_state_.clear();
  position = 0;
  while (PyDict_Next(state, &position, &key, &value)) known_state_.emplace_back(key, value);
  return false;
}

Ref Table::collect(PyObject* groups, PyObject* state) {
  release();
  // Hashing a tensor runs Python code, so parameters are looked up only when the state's items
  // are others than at the last step.
  if (!knows(state)) entries_.clear();
  Ref pending = Ref::steal(PyList_New(0));
  size_t position = 0;
  for (Py_ssize_t group = 0; group < PyList_GET_SIZE(groups); ++group) {
    const Ref options = Ref::borrow(PyList_GET_ITEM(groups, group));
    if (!PyDict_Check(options.get())) throw std::invalid_argument("param_groups must hold dicts");
    const Ref params = Ref::borrow(item(options.get(), names().params));
    if (!params.get() || !PyList_Check(params.get())) {
      throw std::invalid_argument("the \"params\" of a parameter group must be a list");
    }
    PyObject* requested = item(options.get(), names().state_dtype);
    const int requested_dtype = requested ? dtype_code(requested) : -1;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.get()); ++i, ++position) {
      const Ref param = Ref::borrow(PyList_GET_ITEM(params.get(), i));
      const Ref grad = Ref::steal(PyObject_GetAttr(param.get(), names().grad));
      if (position == entries_.size()) entries_.push_back({});
      Entry& entry = entries_[position];
      if (entry.param != param.get()) entry = {param.get(), item(state, param.get()), {}, {}, {}};
      if (grad.get() == Py_None) continue;
      if (collect_one(entry, grad.get(), group, requested_dtype)) continue;
      const Ref row = Ref::steal(Py_BuildValue("(nOO)", group, param.get(), grad.get()));
      if (PyList_Append(pending.get(), row.get()) != 0) throw PythonError();
    }
  }
  return pending;
}

bool Table::collect_one(Entry& entry, PyObject* grad, int64_t group, int requested_dtype) {
  if (!entry.state || !PyDict_Check(entry.state)) return false;
  PyObject* step = item(entry.state, names().step);
  const Tensors tensors = {entry.param, grad, item(entry.state, names().exp_avg),
                           item(entry.state, names().exp_avg_sq)};
  StepCell cell;
  if (!step || !tensors.exp_avg || !tensors.exp_avg_sq) return false;
  if (refuse(tensors) || read_step(step, cell) || is_negated(grad)) return false;
  if (exp_avg_.dtype != state_dtype(static_cast<DType>(param_.dtype), requested_dtype))
    return false;
  if (entry.param_data != param_.data || entry.exp_avg_data != exp_avg_.data ||
      entry.exp_avg_sq_data != exp_avg_sq_.data) {
    for (PyObject* written : {tensors.param, tensors.exp_avg, tensors.exp_avg_sq}) {
      if (is_negated(written)) return false;
    }
    entry.param_data = param_.data;
    entry.exp_avg_data = exp_avg_.data;
    entry.exp_avg_sq_data = exp_avg_sq_.data;
  }
  append(tensors, step, cell, group, entry.param);
  return true;
}

void Table::add(PyObject* param, PyObject* grad, PyObject* exp_avg, PyObject* exp_avg_sq,
                PyObject* step, int64_t group, PyObject* owner) {
  const Tensors tensors = {param, grad, exp_avg, exp_avg_sq};
  const char* reason = refuse(tensors);
  StepCell cell;
  if (!reason && PyFloat_Check(step)) {
    cell.next = PyFloat_AS_DOUBLE(step);
  } else if (!reason) {
    reason = read_step(step, cell);
  }
  for (PyObject* tensor : {param, grad, exp_avg, exp_avg_sq}) {
    if (!reason && is_negated(tensor)) {
      reason = "a tensor is a negated view (is_neg() is true); call resolve_neg() on it";
    }
  }
  if (reason) throw std::invalid_argument(reason);
  append(tensors, step, cell, group, owner);
}

const char* Table::refuse(const Tensors& tensors) {
  if (!describe(tensors.param, param_)) return "param has no memory that a kernel can use";
  if (!describe(tensors.grad, grad_)) return "grad has no memory that a kernel can use";
  if (!describe(tensors.exp_avg, exp_avg_)) return "exp_avg has no memory that a kernel can use";
  if (!describe(tensors.exp_avg_sq, exp_avg_sq_)) {
    return "exp_avg_sq has no memory that a kernel can use";
  }
  const TensorInfo* others[] = {&grad_, &exp_avg_, &exp_avg_sq_};
  for (const TensorInfo* other : others) {
    if (!(other->device == param_.device)) return "param, grad and moments are on several devices";
    if (!same_shape(param_, *other)) return "param, grad and moments differ in shape";
    if (other->dtype < 0) return "grad and moments must be float32, bfloat16, float16 or float64";
  }
  if (param_.dtype < 0) return "param must be float32, bfloat16, float16 or float64";
  if (exp_avg_.dtype != exp_avg_sq_.dtype) return "exp_avg and exp_avg_sq differ in dtype";
  if (!supported({static_cast<DType>(param_.dtype), static_cast<DType>(grad_.dtype),
                  static_cast<DType>(exp_avg_.dtype)})) {
    return "float64 goes with float64 only, for param, grad and moments alike";
  }
  if (!is_dense(param_)) return "param is not dense: it has gaps or elements that share memory";
  for (const TensorInfo* other : others) {
    if (!same_layout(param_, *other)) return "param, grad and moments differ in strides";
  }
  return nullptr;
}

const char* Table::read_step(PyObject* step, StepCell& cell) {
  if (!describe(step, step_) || step_.device.type != kCPU || step_.numel != 1 ||
      (step_.dtype != kFloat32 && step_.dtype != kFloat64)) {
    return "step must be one float32 or float64 in a CPU tensor";
  }
  cell.cell = step_.data;
  cell.is_double = step_.dtype == kFloat64;
  // Added in the tensor's own type: a float32 count stays at 2^24, as torch's does.
  cell.next = cell.is_double ? *reinterpret_cast<double*>(step_.data) + 1.0
                             : static_cast<double>(*reinterpret_cast<float*>(step_.data) + 1.0f);
  return nullptr;
}

void Table::append(const Tensors& tensors, PyObject* step, const StepCell& cell, int64_t group,
                   PyObject* owner) {
  Bucket& bucket =
      bucket_of(param_.device, {static_cast<DType>(param_.dtype), static_cast<DType>(grad_.dtype),
                                static_cast<DType>(exp_avg_.dtype)});
  bucket.segments.push_back({param_.data, grad_.data, exp_avg_.data, exp_avg_sq_.data, param_.numel,
                             scalars_index(group, cell.next)});
  bucket.owners.push_back(static_cast<int64_t>(owners_.size()));
  bucket.params.push_back(Ref::borrow(tensors.param));
  bucket.grads.push_back(Ref::borrow(tensors.grad));
  bucket.exp_avgs.push_back(Ref::borrow(tensors.exp_avg));
  bucket.exp_avg_sqs.push_back(Ref::borrow(tensors.exp_avg_sq));
  if (cell.cell) {
    cells_.push_back(cell);
    steps_.push_back(Ref::borrow(step));
  }
  owners_.push_back(Ref::borrow(owner));
}

int64_t Table::scalars_index(int64_t group, double step) {
  // Nearly always the count of the parameter before.
  for (size_t i = counts_.size(); i-- > 0;) {
    if (counts_[i].group == group && counts_[i].step == step) return static_cast<int64_t>(i);
  }
  counts_.push_back({group, step});
  return static_cast<int64_t>(counts_.size()) - 1;
}

Bucket& Table::bucket_of(const Device& device, const DTypeSet& dtypes) {
  for (Bucket& bucket : buckets_) {
    if (bucket.device == device && bucket.dtypes == dtypes) return bucket;
  }
  return buckets_.emplace_back(device, dtypes);
}

bool Table::written_unchanged() {
  size_t i = 0;
  for (const Bucket& bucket : buckets_) {
    for (const Segment& s : bucket.segments) {
      if (i == verified_.size()) return false;
      const Segment& old = verified_[i++];
      if (s.param != old.param || s.exp_avg != old.exp_avg || s.exp_avg_sq != old.exp_avg_sq ||
          s.numel != old.numel) {
        return false;
      }
    }
  }
  return i == verified_.size();
}

std::optional<Overlap> Table::find_overlap() {
  const auto bytes = [](DType dtype, int64_t numel) { return numel * kDTypeSizes[dtype]; };
  if (!written_unchanged()) {
    verified_.clear();
    written_.clear();
    for (const Bucket& bucket : buckets_) {
      for (size_t i = 0; i < bucket.segments.size(); ++i) {
        const Segment& s = bucket.segments[i];
        const auto write = [&](const void* data, DType dtype, const char* stream) {
          const char* begin = static_cast<const char*>(data);
          if (s.numel)
            written_.push_back({begin, begin + bytes(dtype, s.numel), bucket.owners[i], stream});
        };
        write(s.param, bucket.dtypes.param, "param");
        write(s.exp_avg, bucket.dtypes.state, "exp_avg");
        write(s.exp_avg_sq, bucket.dtypes.state, "exp_avg_sq");
        verified_.push_back(s);
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
  }
  for (const Bucket& bucket : buckets_) {
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
  return std::nullopt;
}

void Table::advance() {
  for (const StepCell& cell : cells_) {
    if (cell.is_double) {
      *static_cast<double*>(cell.cell) = cell.next;
    } else {
      *static_cast<float*>(cell.cell) = static_cast<float>(cell.next);
    }
  }
}

void Table::release() {
  for (Bucket& bucket : buckets_) {
    bucket.segments.clear();
    bucket.owners.clear();
    for (auto* held : {&bucket.params, &bucket.grads, &bucket.exp_avgs, &bucket.exp_avg_sqs}) {
      held->clear();
    }
  }
  counts_.clear();
  cells_.clear();
  steps_.clear();
  owners_.clear();
}

std::vector<Bucket*> Table::buckets() {
  std::vector<Bucket*> filled;
  for (Bucket& bucket : buckets_) {
    if (!bucket.segments.empty()) filled.push_back(&bucket);
  }
  return filled;
}

}  // namespace radam
