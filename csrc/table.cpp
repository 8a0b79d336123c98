// Everything a step must know is looked at anew at every step, in one pass: what people edit
// between steps (gradients, pointers, state, step counts) can't be missed. A tensor is asked again
// only where snapshot.h finds it changed.
#include "table.h"

#include <stdexcept>

#include "hyperparameters.h"

namespace radam {
namespace {

// Names that a step looks up, interned once and never released.
struct Names {
#define RADAM_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  RADAM_NAME(capturable);
  RADAM_NAME(exp_avg);
  RADAM_NAME(exp_avg_sq);
  RADAM_NAME(grad);
  RADAM_NAME(is_neg);
  RADAM_NAME(lr);
  RADAM_NAME(params);
  RADAM_NAME(state_dtype);
  RADAM_NAME(step);
#undef RADAM_NAME
};

const Names& names() {
  static const Names interned;
  return interned;
}

// The three items of a parameter's state; false if one is missing.
bool find_items(PyObject* state, Ref& step, Ref& exp_avg, Ref& exp_avg_sq) {
  PyObject *keys[3], *values[3];
  Py_ssize_t position = 0;
  int n = 0;
  while (n < 3 && PyDict_Next(state, &position, &keys[n], &values[n])) ++n;
  // Nearly always in the order in which they were put there, under interned names.
  if (n < 3 || keys[0] != names().step || keys[1] != names().exp_avg ||
      keys[2] != names().exp_avg_sq) {
    values[0] = item(state, names().step);
    values[1] = item(state, names().exp_avg);
    values[2] = item(state, names().exp_avg_sq);
  }
  if (!values[0] || !values[1] || !values[2]) return false;
  step = Ref::borrow(values[0]);
  exp_avg = Ref::borrow(values[1]);
  exp_avg_sq = Ref::borrow(values[2]);
  return true;
}

// Calls visit(group index, group, param) for every parameter, holding the latter two meanwhile.
template <typename Visit>
void for_each_param(PyObject* groups, const Visit& visit) {
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref group = Ref::borrow(PyList_GET_ITEM(groups, g));
    if (!PyDict_Check(group.get())) throw std::invalid_argument("param_groups must hold dicts");
    const Ref params = Ref::borrow(item(group.get(), names().params));
    if (!params.get() || !PyList_Check(params.get())) {
      throw std::invalid_argument("the \"params\" of a parameter group must be a list");
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.get()); ++i) {
      const Ref param = Ref::borrow(PyList_GET_ITEM(params.get(), i));
      visit(static_cast<int64_t>(g), group.get(), param.get());
    }
  }
}

// param.grad, a new reference. For the plain types it calls the getter of the attribute, which is
// always the same, instead of looking for it in every class of the type; for others it takes back
// the trust that no Python code has run.
Ref gradient(PyObject* param, bool& trusted) {
  struct Plain {
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    PyGetSetDef* grad = nullptr;

    Plain() {
      const Ref torch = Ref::steal(PyImport_ImportModule("torch.nn"));
      const Ref type = attribute(torch.get(), "Parameter");
      Ref found = attribute(type.get(), "grad");
      if (!PyObject_TypeCheck(found.get(), &PyGetSetDescr_Type)) return;
      grad = reinterpret_cast<PyGetSetDescrObject*>(found.release())->d_getset;
      parameter = reinterpret_cast<PyTypeObject*>(type.get());
      tensor = parameter->tp_base;
    }
  };
  static const Plain plain;
  if (plain.grad && (Py_TYPE(param) == plain.parameter || Py_TYPE(param) == plain.tensor)) {
    return Ref::steal(plain.grad->get(param, plain.grad->closure));
  }
  trusted = false;
  return Ref::steal(PyObject_GetAttr(param, names().grad));
}

// A lazily negated tensor holds the wrong signs in memory. Asking costs as much as everything else
// that a step asks of a tensor; but such a tensor is the imaginary part of a conjugate: it has a
// stride of two, and is dense only if it has one element. (Nor do they start on 16 bytes, mostly.)
bool is_negated(PyObject* tensor, const TensorInfo& info) {
  if (info.numel != 1 && reinterpret_cast<uintptr_t>(info.data) % 16 == 0) return false;
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
  // are others than at the last step; and from the first one on that is another, or that is of a
  // class whose `grad` may run code, which may do anything.
  bool trusted = knows(state);
  Ref pending = Ref::steal(PyList_New(0));
  size_t position = 0;
  int64_t last_group = -1;
  GroupOptions options{};
  for_each_param(groups, [&](int64_t group, PyObject* dict, PyObject* param) {
    if (group != last_group) options = read_options(dict);
    last_group = group;
    const Ref grad = gradient(param, trusted);
    trusted = trusted && position < entries_.size() && entries_[position].param == param;
    if (!trusted) {
      entries_.resize(position);
      entries_.push_back({param, item(state, param), {}});
    }
    Entry& entry = entries_[position++];
    if (grad.get() == Py_None || collect_one(entry, grad.get(), group, options)) return;
    const Ref row = Ref::steal(Py_BuildValue("(LOO)", group, param, grad.get()));
    if (PyList_Append(pending.get(), row.get()) != 0) throw PythonError();
  });
  // What ran meanwhile may have changed the state, and an entry may be newer than what is known.
  if (!trusted && !knows(state)) entries_.clear();
  return pending;
}

Table::GroupOptions Table::read_options(PyObject* group) {
  PyObject* dtype = item(group, names().state_dtype);
  PyObject* capturable = item(group, names().capturable);
  const int truth = capturable ? PyObject_IsTrue(capturable) : 0;
  if (truth < 0) throw PythonError();
  return {dtype ? dtype_code(dtype) : -1, truth == 1};
}

bool Table::collect_one(Entry& entry, PyObject* grad, int64_t group, const GroupOptions& options) {
  if (!entry.state || !PyDict_Check(entry.state)) return false;
  Ref step, exp_avg, exp_avg_sq;
  if (!find_items(entry.state, step, exp_avg, exp_avg_sq)) return false;
  const Objects objects = {entry.param, grad, exp_avg.get(), exp_avg_sq.get()};
  if (refuse(objects, entry.snapshots)) return false;
  if (exp_avg_.dtype != state_dtype(static_cast<DType>(param_.dtype), options.state_dtype)) {
    return false;
  }
  if (read_step(step.get(), options.capturable, entry.snapshots)) return false;
  if (options.capturable) {
    append_capturable(objects, step.get(), group, entry.param);
  } else {
    append(objects, count_step(step.get(), group), entry.param);
  }
  return true;
}

void Table::add(PyObject* param, PyObject* grad, PyObject* exp_avg, PyObject* exp_avg_sq,
                PyObject* step, int64_t group, PyObject* owner, bool capturable) {
  const Objects objects = {param, grad, exp_avg, exp_avg_sq};
  Snapshots none;
  const char* reason = refuse(objects, none);
  const bool counted = PyFloat_Check(step);
  if (!reason && !counted) reason = read_step(step, capturable, none);
  if (reason) throw std::invalid_argument(reason);
  if (counted) {
    append(objects, scalars_index(group, PyFloat_AS_DOUBLE(step)), owner);
  } else if (capturable) {
    append_capturable(objects, step, group, owner);
  } else {
    append(objects, count_step(step, group), owner);
  }
}

const char* Table::refuse(const Objects& objects, Snapshots& snapshots) {
  if (!snapshots.param.describe(objects.param, param_))
    return "param has no memory that a kernel can use";
  if (!snapshots.grad.describe(objects.grad, grad_))
    return "grad has no memory that a kernel can use";
  if (!snapshots.exp_avg.describe(objects.exp_avg, exp_avg_))
    return "exp_avg has no memory that a kernel can use";
  if (!snapshots.exp_avg_sq.describe(objects.exp_avg_sq, exp_avg_sq_)) {
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
  const TensorInfo* infos[] = {&param_, &grad_, &exp_avg_, &exp_avg_sq_};
  PyObject* const all[] = {objects.param, objects.grad, objects.exp_avg, objects.exp_avg_sq};
  for (int i = 0; i < 4; ++i) {
    if (is_negated(all[i], *infos[i])) {
      return "a tensor is a negated view (is_neg() is true); call resolve_neg() on it";
    }
  }
  return nullptr;
}

const char* Table::read_step(PyObject* step, bool capturable, Snapshots& snapshots) {
  const bool good = snapshots.step.describe(step, step_) && step_.numel == 1 &&
                    (step_.dtype == kFloat32 || step_.dtype == kFloat64);
  if (capturable) {
    return good && step_.device == param_.device
               ? nullptr
               : "step must be one float32 or float64 in a tensor on the parameter's device, "
                 "as capturable is true";
  }
  return good && step_.device.type == kCPU ? nullptr
                                           : "step must be one float32 or float64 in a CPU tensor";
}

int64_t Table::count_step(PyObject* step, int64_t group) {
  const double next = next_count(step_.data, step_.dtype);
  advances_.push_back({step_.data, step_.dtype, next, Ref::borrow(step)});
  return scalars_index(group, next);
}

void Table::append(const Objects& objects, int64_t scalars, PyObject* owner) {
  append_to(bucket_of(false), objects, scalars, owner);
}

void Table::append_capturable(const Objects& objects, PyObject* step, int64_t group,
                              PyObject* owner) {
  Bucket& bucket = bucket_of(true);
  append_to(bucket, objects, static_cast<int64_t>(bucket.counters.size()), owner);
  bucket.counters.push_back({step_.data, step_.dtype, static_cast<int32_t>(group)});
  bucket.steps.push_back(Ref::borrow(step));
}

void Table::append_to(Bucket& bucket, const Objects& objects, int64_t scalars, PyObject* owner) {
  bucket.segments.push_back(
      {param_.data, grad_.data, exp_avg_.data, exp_avg_sq_.data, param_.numel, scalars});
  bucket.owners.push_back(PyList_GET_SIZE(owners_.get()));
  bucket.tensors.push_back({Ref::borrow(objects.param), Ref::borrow(objects.grad),
                            Ref::borrow(objects.exp_avg), Ref::borrow(objects.exp_avg_sq)});
  if (PyList_Append(owners_.get(), owner) != 0) throw PythonError();
}

int64_t Table::scalars_index(int64_t group, double step) {
  // Nearly always the count of the parameter before.
  for (size_t i = counts_.size(); i-- > 0;) {
    if (counts_[i].group == group && counts_[i].step == step) return static_cast<int64_t>(i);
  }
  counts_.push_back({group, step});
  return static_cast<int64_t>(counts_.size()) - 1;
}

// The bucket for the tensors last described.
Bucket& Table::bucket_of(bool capturable) {
  const DTypeSet dtypes = {static_cast<DType>(param_.dtype), static_cast<DType>(grad_.dtype),
                           static_cast<DType>(exp_avg_.dtype)};
  for (Bucket& bucket : buckets_) {
    if (bucket.device == param_.device && bucket.dtypes == dtypes &&
        bucket.capturable == capturable) {
      return bucket;
    }
  }
  return buckets_.emplace_back(param_.device, dtypes, capturable);
}

namespace {

// Raises what radam_kernels.schedule has to say of options that no step can be made of.
void check(PyObject* group, bool read, const Hyperparameters& h, double step) {
  if (read && valid(h, step)) return;
  const Ref schedule = Ref::steal(PyImport_ImportModule("radam_kernels.schedule"));
  Ref::steal(PyObject_CallMethod(schedule.get(), "group_scalars", "Od", group, step));
  throw std::invalid_argument("hyperparameters that radam_kernels.schedule takes, but no kernel");
}

}  // namespace

const std::vector<StepScalars>& Table::scalars(PyObject* groups) {
  for (size_t i = scalars_.size(); i < counts_.size(); ++i) {
    const Count count = counts_[i];
    const Ref group = Ref::borrow(PyList_GetItem(groups, count.group));
    if (!group.get()) throw PythonError();
    Hyperparameters options;
    check(group.get(), read_hyperparameters(group.get(), options), options, count.step);
    scalars_.push_back(step_scalars(options, count.step));
  }
  return scalars_;
}

void Table::read_device_groups(PyObject* groups) {
  for (Bucket& bucket : buckets_) {
    bucket.hyperparameters.assign(bucket.capturable ? PyList_GET_SIZE(groups) : 0, {});
    int64_t last = -1;  // of one group all parameters come in a row
    for (size_t i = 0; i < bucket.counters.size(); ++i) {
      const int32_t index = bucket.counters[i].group;
      if (index == last) continue;
      last = index;
      const Ref group = Ref::borrow(PyList_GetItem(groups, index));
      if (!group.get()) throw PythonError();
      Hyperparameters& row = bucket.hyperparameters[static_cast<size_t>(index)];
      check(group.get(), read_hyperparameters(group.get(), row, &bucket.device), row, 1.0);
      if (row.lr_data) bucket.learning_rates.push_back(Ref::borrow(item(group.get(), names().lr)));
    }
  }
}

Ref Table::advance() {
  for (const Advance& advance : advances_) write_count(advance.data, advance.dtype, advance.next);
  Ref owners = std::move(owners_);
  release();
  return owners;
}

void Table::release() {
  for (Bucket& bucket : buckets_) bucket.release();
  counts_.clear();
  scalars_.clear();
  advances_.clear();
  owners_ = Ref::steal(PyList_New(0));
}

std::vector<Bucket*> Table::buckets() {
  std::vector<Bucket*> filled;
  for (Bucket& bucket : buckets_) {
    if (!bucket.segments.empty()) filled.push_back(&bucket);
  }
  return filled;
}

}  // namespace radam
