// All that a step depends on is read at every step, in one pass, so that an edit between steps
// (gradients, pointers, state, step counts) can't be missed. What the last step saw serves as a
// hint: where a parameter's state is, which addresses to prefetch, and which tensors are the same
// ones, so that check_memory() need not look at them again.
#include "host/plan.h"

#include <stdexcept>

#include "cpu/step_cpu.h"
#include "host/dtensor.h"

namespace radam {
namespace {

enum Stream { kParam, kGrad, kExpAvg, kExpAvgSq, kStep };
constexpr const char* kStreamNames[] = {"param", "grad", "exp_avg", "exp_avg_sq", "step"};

// No tensor is below this address, unless its storage was freed; or it is looked at more closely.
constexpr uintptr_t kLowest = uintptr_t{1} << 40;

// Parameters that are prefetched ahead of the walk.
constexpr size_t kAhead = 4;

// Names that a step looks up, interned once and never released.
struct Names {
#define RADAM_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  RADAM_NAME(capturable);
  RADAM_NAME(exp_avg);
  RADAM_NAME(exp_avg_sq);
  RADAM_NAME(found_inf);
  RADAM_NAME(grad);
  RADAM_NAME(grad_scale);
  RADAM_NAME(params);
  RADAM_NAME(state_dtype);
  RADAM_NAME(step);
#undef RADAM_NAME
};

const Names& names() {
  static const Names interned;
  return interned;
}

// param.grad. For the plain types and DTensor it calls the getter of the attribute directly instead
// of looking for it in every class of the type.
Ref gradient(PyObject* param) {
  struct Plain {
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    PyGetSetDef* grad = nullptr;

    Plain() {
      const Ref torch = Ref::steal(PyImport_ImportModule("torch.nn"));
      Ref type = attribute(torch.get(), "Parameter");
      Ref found = attribute(type.get(), "grad");
      if (!PyObject_TypeCheck(found.get(), &PyGetSetDescr_Type)) return;
      grad = reinterpret_cast<PyGetSetDescrObject*>(found.release())->d_getset;
      parameter = reinterpret_cast<PyTypeObject*>(type.release());
      tensor = parameter->tp_base;
    }
  };
  static const Plain plain;
  PyTypeObject* type = Py_TYPE(param);
  if (plain.grad && (type == plain.parameter || type == plain.tensor || is_dtensor(param))) {
    return Ref::steal(plain.grad->get(param, plain.grad->closure));
  }
  return Ref::steal(PyObject_GetAttr(param, names().grad));
}

// What a list, or any other iterable, holds now.
Ref tuple(PyObject* object, const char* message) {
  const Ref sequence = Ref::steal(PySequence_Fast(object, message));
  return Ref::steal(PySequence_Tuple(sequence.get()));
}

void append_to(PyObject* list, PyObject* object) {
  if (PyList_Append(list, object) != 0) throw PythonError();
}

// Other threads run while one of these lives.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { PyEval_RestoreThread(state_); }
  GilReleased(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

Ref text(const char* stream, const char* reason) {
  return Ref::steal(PyUnicode_FromFormat("%s%s", stream, reason));
}

float number(PyObject* scaling, PyObject* name, float otherwise) {
  const Ref value = Ref::steal(PyObject_GetAttr(scaling, name));
  if (value.get() == Py_None) return otherwise;
  const double x = PyFloat_AsDouble(value.get());
  if (x == -1.0 && PyErr_Occurred()) throw PythonError();
  return static_cast<float>(x);
}

}  // namespace

// The walk

Ref Plan::refresh(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* scaling) {
  release();
  find_dtensor();
  const Ref pending = Ref::steal(PyList_New(0));
  const Ref all = tuple(groups, "param_groups: expected a list of dicts");
  if (!PyDict_Check(state)) throw std::invalid_argument("state: expected a dict of dicts");
  walk(all.get(), state, repaired, pending.get());
  if (PyList_GET_SIZE(pending.get()) == 0) complete(all.get(), scaling);
  return Ref::borrow(pending.get());
}

void Plan::walk(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* pending) {
  for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(groups); ++g) {
    PyObject* options = PyTuple_GET_ITEM(groups, g);
    if (!PyDict_Check(options)) {
      throw std::invalid_argument("param_groups[" + std::to_string(g) + "]: expected a dict");
    }
    add_group(options);
    const Ref found = item(options, names().params);
    if (!found.get())
      throw std::invalid_argument("param_groups[" + std::to_string(g) + "] has no \"params\"");
    groups_.back().params =
        tuple(found.get(), "\"params\" of a parameter group: expected a list of tensors");
  }
  // After the parameters: none that is made later, at the address of a key that is gone, is found.
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    items_.emplace_back(key, Ref::borrow(value));
  }
  Py_ssize_t position = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* params = groups_[g].params.get();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(params); ++i, ++position) {
      const Ref owner = Ref::borrow(PyTuple_GET_ITEM(params, i));
      prefetch(static_cast<size_t>(position));
      const Ref grad = gradient(owner.get());
      if (static_cast<size_t>(position) == entries_.size()) entries_.emplace_back();
      Entry& entry = entries_[static_cast<size_t>(position)];
      if (grad.get() == Py_None) continue;
      Reason reason = {"it has no state"};
      const int64_t group = static_cast<int64_t>(g);
      if (find_replacement(repaired, owner.get())) {
        reason = take(owner, group, entry);
      } else if (find_row(find_state(owner.get(), entry))) {
        row_.param = Ref::borrow(owner.get());
        row_.grad = Ref::borrow(grad.get());
        reason = take(owner, group, entry);
      }
      if (!reason) continue;
      const Ref left =
          Ref::steal(Py_BuildValue("(OOON)", groups_[g].options.get(), owner.get(), grad.get(),
                                   text(reason.stream, reason.text).release()));
      append_to(pending, left.get());
    }
  }
  entries_.resize(static_cast<size_t>(position));
}

Ref Plan::refresh_tensors(PyObject* params, PyObject* grads, PyObject* exp_avgs,
                          PyObject* exp_avg_sqs, double step, PyObject* group) {
  release();
  find_dtensor();
  const Ref pending = Ref::steal(PyList_New(0));
  add_group(group);
  groups_.back().counted = true;
  count_ = step;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    const auto part = [&](PyObject* list) { return Ref::borrow(PyList_GetItem(list, i)); };
    const Ref owner = part(params);
    row_ = {part(params), part(grads), part(exp_avgs), part(exp_avg_sqs), Ref()};
    written_.push_back(part(exp_avgs));
    written_.push_back(part(exp_avg_sqs));
    Entry entry;
    if (const Reason reason = take(owner, 0, entry)) {
      const Ref left =
          Ref::steal(Py_BuildValue("(nN)", i, text(reason.stream, reason.text).release()));
      append_to(pending.get(), left.get());
    }
  }
  if (PyList_GET_SIZE(pending.get()) == 0) {
    const Ref groups = Ref::steal(Py_BuildValue("[O]", group));
    complete(groups.get(), Py_None);
  }
  return Ref::borrow(pending.get());
}

void Plan::add_group(PyObject* options) {
  const Ref dtype = item(options, names().state_dtype);
  const Ref capturable = item(options, names().capturable);
  groups_.push_back({Ref::borrow(options), -1, false});
  Group& group = groups_.back();
  if (dtype.get() && dtype.get() != Py_None) {
    group.state_dtype = dtype_code(dtype.get());
    if (group.state_dtype < 0 || group.state_dtype == kFloat64) {
      throw InvalidGroup{static_cast<int64_t>(groups_.size()) - 1, 1.0};
    }
  }
  const int truth = capturable.get() ? PyObject_IsTrue(capturable.get()) : 0;
  if (truth < 0) throw PythonError();
  group.capturable = truth == 1;
}

// The value of `param` in the optimizer's state; null if it has none. A dict lookup would hash the
// parameter, which runs Python code; most parameters are where they were at the last step.
PyObject* Plan::find_state(PyObject* param, Entry& entry) {
  if (entry.item >= items_.size() || items_[entry.item].first != param) {
    if (item_of_.empty()) {
      for (size_t i = 0; i < items_.size(); ++i) item_of_.emplace(items_[i].first, i);
    }
    const auto found = item_of_.find(param);
    if (found == item_of_.end()) return nullptr;
    entry.item = found->second;
  }
  return items_[entry.item].second.get();
}

// Fills row_ with what is stepped in the place of a parameter, if anything is.
bool Plan::find_replacement(PyObject* repaired, PyObject* owner) {
  if (PyDict_GET_SIZE(repaired) == 0) return false;
  const Ref key = Ref::steal(PyLong_FromVoidPtr(owner));
  const Ref found = item(repaired, key.get());
  if (!found.get()) return false;
  const auto part = [&](int i) { return Ref::borrow(PyTuple_GET_ITEM(found.get(), i)); };
  row_ = {part(1), part(2), part(3), part(4), part(5)};
  return true;
}

// Fills the moments and the step of row_ from a parameter's state; false if one is missing.
bool Plan::find_row(PyObject* state) {
  if (!state || !PyDict_Check(state)) return false;
  PyObject *keys[3], *values[3];
  Py_ssize_t position = 0;
  int n = 0;
  while (n < 3 && PyDict_Next(state, &position, &keys[n], &values[n])) ++n;
  // Nearly always in the order in which they were put there, under interned names.
  if (n == 3 && keys[0] == names().step && keys[1] == names().exp_avg &&
      keys[2] == names().exp_avg_sq) {
    row_.step = Ref::borrow(values[0]);
    row_.exp_avg = Ref::borrow(values[1]);
    row_.exp_avg_sq = Ref::borrow(values[2]);
  } else {
    row_.step = item(state, names().step);
    row_.exp_avg = item(state, names().exp_avg);
    row_.exp_avg_sq = item(state, names().exp_avg_sq);
  }
  return row_.step.get() && row_.exp_avg.get() && row_.exp_avg_sq.get();
}

// In training the caches are cold: asks for what the walk will read a few parameters from now. A
// stale address does no harm.
void Plan::prefetch(size_t position) const {
  const auto state_of = [&](size_t at) -> PyObject* {
    if (at >= entries_.size() || entries_[at].item >= items_.size()) return nullptr;
    return items_[entries_[at].item].second.get();
  };
  if (PyObject* state = state_of(position + 2 * kAhead)) __builtin_prefetch(state);
  if (position + kAhead >= entries_.size()) return;
  PyObject* state = state_of(position + kAhead);
  if (state && PyDict_Check(state)) {
    const char* keys =
        reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(state)->ma_keys);
    for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
  }
  for (const Seen& seen : entries_[position + kAhead].seen) {
    __builtin_prefetch(seen.object);
    __builtin_prefetch(seen.impl);
    __builtin_prefetch(static_cast<const char*>(seen.impl) - 64);
    __builtin_prefetch(static_cast<const char*>(seen.impl) + 64);
    __builtin_prefetch(seen.data);
  }
}

// Checks

// Adds row_ to its bucket, unless there is a reason why it can't be stepped.
Plan::Reason Plan::take(const Ref& owner, int64_t group, Entry& entry) {
  const Group& options = groups_[static_cast<size_t>(group)];
  if (is_dtensor(row_.param.get())) {
    if (const Reason reason = use_local_tensors()) return reason;
  }
  if (const Reason reason = check(entry)) return reason;
  if (!options.counted) {
    const DType param = static_cast<DType>(infos_[kParam].dtype);
    // There is no complex bfloat16.
    const bool none = infos_[kParam].complex && options.state_dtype == kBFloat16;
    if (infos_[kExpAvg].dtype != state_dtype(param, none ? -1 : options.state_dtype)) {
      return {"exp_avg and exp_avg_sq have another dtype than state_dtype"};
    }
    if (const Reason reason = check_step(options, entry.seen[kStep])) return reason;
  }
  append(owner, group);
  return {};
}

// Replaces DTensors that are placed alike by this rank's parts of them.
Plan::Reason Plan::use_local_tensors() {
  Ref* const streams[] = {&row_.param, &row_.grad, &row_.exp_avg, &row_.exp_avg_sq};
  Ref locals[4];
  for (int i = 0; i < 4; ++i) {
    PyObject* tensor = streams[i]->get();
    if (!is_dtensor(tensor)) return {" is not a DTensor as param is", kStreamNames[i]};
    if (i > 0 && !same_placement(row_.param.get(), tensor)) {
      return {" is placed in another way than param", kStreamNames[i]};
    }
    locals[i] = local_tensor(tensor);
    if (!locals[i].get()) return {" has no plain local tensor", kStreamNames[i]};
  }
  for (int i = 0; i < 4; ++i) *streams[i] = std::move(locals[i]);
  return {};
}

// Describes the four tensors of row_ in infos_; why they can't be stepped together.
Plan::Reason Plan::check(Entry& entry) {
  PyObject* const all[] = {row_.param.get(), row_.grad.get(), row_.exp_avg.get(),
                           row_.exp_avg_sq.get()};
  for (int i = 0; i < 4; ++i) {
    if (!describe(all[i], infos_[i])) {
      return {" has no memory that a kernel can use", kStreamNames[i]};
    }
  }
  const TensorInfo& param = infos_[kParam];
  if (param.dtype < 0) return {"param must be float32, bfloat16, float16, float64 or complex"};
  for (int i = 1; i < 4; ++i) {
    const TensorInfo& other = infos_[i];
    if (!(other.device == param.device)) return {"param, grad and moments are on several devices"};
    if (!same_shape(param, other)) return {"param, grad and moments differ in shape"};
    if (other.dtype < 0) return {"grad and moments must be float32, bfloat16, float16 or float64"};
    if (other.complex != param.complex) return {"of param, grad and moments some are complex"};
  }
  if (infos_[kExpAvg].dtype != infos_[kExpAvgSq].dtype) {
    return {"exp_avg and exp_avg_sq differ in dtype"};
  }
  if (!supported({static_cast<DType>(param.dtype), static_cast<DType>(infos_[kGrad].dtype),
                  static_cast<DType>(infos_[kExpAvg].dtype)})) {
    return {"float64 goes with float64 only, for param, grad and moments alike"};
  }
  if (!is_dense(param)) return {"param is not dense: it has gaps or elements that share memory"};
  for (int i = 1; i < 4; ++i) {
    if (!same_layout(param, infos_[i])) return {"param, grad and moments differ in strides"};
  }
  for (int i = 0; i < 4; ++i) {
    if (const Reason reason = check_memory(i, entry.seen[i])) return reason;
  }
  return {};
}

// What describe() does not tell takes longer than all that it does. So it is asked for once, and
// again when the tensor's object or memory is another one than at the last step.
Plan::Reason Plan::check_memory(int stream, Seen& seen) const {
  const Ref* const tensors[] = {&row_.param, &row_.grad, &row_.exp_avg, &row_.exp_avg_sq,
                                &row_.step};
  PyObject* const tensor = tensors[stream]->get();
  const TensorInfo& info = infos_[stream];
  const bool same = seen.object == tensor && seen.impl == info.sizes && seen.data == info.data;
  // Gradients come from anywhere, at every step; and p.data = p.data.conj() stays on its memory.
  if (!same || stream == kGrad || info.complex) {
    if (const char* reason = find_lazy(tensor, info)) return {reason, kStreamNames[stream]};
  }
  if (same) return {};
  // Most gradients are new at each step, and only read. Where a storage was freed, the address is
  // the offset into it: far below all that is ever allocated.
  if (stream != kGrad || reinterpret_cast<uintptr_t>(info.data) < kLowest) {
    if (const char* reason = find_short_storage(tensor, info))
      return {reason, kStreamNames[stream]};
  }
  seen = {tensor, info.sizes, info.data};
  return {};
}

Plan::Reason Plan::check_step(const Group& group, Seen& seen) {
  TensorInfo& info = infos_[kStep];
  const bool good = describe(row_.step.get(), info) && info.numel == 1 && !info.complex &&
                    (info.dtype == kFloat32 || info.dtype == kFloat64);
  if (group.capturable) {
    if (!good || !(info.device == infos_[kParam].device)) {
      return {
          "step must be one float32 or float64 in a tensor on the parameter's device, as "
          "capturable is true"};
    }
  } else if (!good || info.device.type != kCPU) {
    return {"step must be one float32 or float64 in a CPU tensor"};
  }
  return check_memory(kStep, seen);
}

// Buckets

void Plan::append(const Ref& owner, int64_t group) {
  const Group& options = groups_[static_cast<size_t>(group)];
  Bucket& bucket = bucket_of(options.capturable);
  Counter counter = {nullptr, kFloat32, static_cast<int32_t>(group)};
  double next = count_;
  if (!options.counted) {
    counter.step = infos_[kStep].data;
    counter.dtype = infos_[kStep].dtype;
    if (!options.capturable) next = next_count(counter.step, counter.dtype);
  }
  const int64_t scalars = options.capturable ? static_cast<int64_t>(bucket.segments.size())
                                             : scalars_index(bucket, group, next);
  bucket.segments.push_back({infos_[kParam].data, infos_[kExpAvg].data, infos_[kExpAvgSq].data,
                             infos_[kParam].reals(), scalars});
  bucket.grads.push_back(infos_[kGrad].data);
  bucket.owners.push_back(static_cast<int64_t>(owners_.size()));
  bucket.tensors.push_back(std::move(row_));
  bucket.counters.push_back(counter);
  owners_.push_back(Ref::borrow(owner.get()));
}

// The bucket for the tensors last described.
Bucket& Plan::bucket_of(bool capturable) {
  const DTypeSet dtypes = {static_cast<DType>(infos_[kParam].dtype),
                           static_cast<DType>(infos_[kGrad].dtype),
                           static_cast<DType>(infos_[kExpAvg].dtype)};
  for (Bucket& bucket : buckets_) {
    if (bucket.device == infos_[kParam].device && bucket.dtypes == dtypes &&
        bucket.capturable == capturable) {
      return bucket;
    }
  }
  return buckets_.emplace_back(infos_[kParam].device, dtypes, capturable);
}

int64_t Plan::scalars_index(Bucket& bucket, int64_t group, double step) const {
  // Nearly always the count of the parameter before.
  for (size_t i = bucket.counts.size(); i-- > 0;) {
    if (bucket.counts[i].group == group && bucket.counts[i].step == step) {
      return static_cast<int64_t>(i);
    }
  }
  bucket.counts.push_back({group, step});
  return static_cast<int64_t>(bucket.counts.size()) - 1;
}

// Makes the buckets whole, and looks for memory that is used twice.
void Plan::complete(PyObject* groups, PyObject* scaling) {
  for (Bucket& bucket : buckets_) {
    if (bucket.segments.empty()) continue;
    bucket.groups = Ref::borrow(groups);
    bucket.scaling = Ref::borrow(scaling);
    if (bucket.capturable) {
      read_device_groups(bucket, scaling);
    } else {
      make_scalars(bucket);
    }
  }
  if (const auto found = overlap_check_.find(buckets_)) {
    const auto owner = [&](int64_t i) { return owners_[static_cast<size_t>(i)].get(); };
    if (found->stream == found->other_stream && owner(found->owner) == owner(found->other)) {
      throw Refusal{"{0} is given twice; leave one out", {found->owner}};
    }
    throw Refusal{found->stream + " of {0} shares memory with " + found->other_stream +
                      " of {1}; a step writes to it: clone one of them, or leave one out",
                  {found->owner, found->other}};
  }
}

void Plan::make_scalars(Bucket& bucket) {
  for (const Count& count : bucket.counts) {
    Group& group = groups_[static_cast<size_t>(count.group)];
    if (!group.has_host) {
      if (!read_hyperparameters(group.options.get(), group.host)) {
        throw InvalidGroup{count.group, count.step};
      }
      group.has_host = true;
    }
    if (!valid(group.host, count.step)) throw InvalidGroup{count.group, count.step};
    bucket.scalars.push_back(step_scalars(group.host, count.step));
  }
}

void Plan::read_device_groups(Bucket& bucket, PyObject* scaling) {
  bucket.hyperparameters.assign(groups_.size(), {});
  int64_t last = -1;  // the parameters of a group come in a row
  for (const Counter& counter : bucket.counters) {
    if (counter.group == last) continue;
    last = counter.group;
    PyObject* options = groups_[static_cast<size_t>(last)].options.get();
    Hyperparameters& row = bucket.hyperparameters[static_cast<size_t>(last)];
    Ref lr;
    if (!read_hyperparameters(options, row, &bucket.device, &lr) || !valid(row, 1.0)) {
      throw InvalidGroup{last, 1.0};
    }
    if (lr.get()) bucket.learning_rates.push_back(std::move(lr));
  }
  if (bucket.device.type == kCPU) {
    bucket.grad_scale = number(scaling, names().grad_scale, 1.0f);
    bucket.found_inf = number(scaling, names().found_inf, 0.0f);
  }
}

std::vector<Bucket*> Plan::buckets() {
  std::vector<Bucket*> filled;
  for (Bucket& bucket : buckets_) {
    if (!bucket.segments.empty()) filled.push_back(&bucket);
  }
  return filled;
}

Ref Plan::groups() const {
  Ref all = Ref::steal(PyList_New(0));
  for (const Group& group : groups_) append_to(all.get(), group.options.get());
  return all;
}

// The step

void Plan::begin() {
  static PyObject* const increment_version = [] {
    const Ref graph = Ref::steal(PyImport_ImportModule("torch.autograd.graph"));
    return attribute(graph.get(), "increment_version").release();
  }();
  const size_t count = owners_.size() + written_.size();
  const Ref all = Ref::steal(PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i) {
    const Ref& one = i < owners_.size() ? owners_[i] : written_[i - owners_.size()];
    PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), Ref::borrow(one.get()).release());
  }
  // Raises for tensors that must not be written to, such as those of inference mode.
  if (count > 0) Ref::steal(PyObject_CallOneArg(increment_version, all.get()));
  begun_ = true;
}

void Plan::run_bucket(Bucket& bucket, int threads) {
  if (bucket.device.type != kCPU) throw std::invalid_argument("the bucket is not on the CPU");
  const GilReleased released;
  if (bucket.capturable) {
    const Scaling scaling = {&bucket.grad_scale, &bucket.found_inf};
    bucket.scalars.clear();
    for (const Counter& counter : bucket.counters) {
      bucket.scalars.push_back(advance(counter, bucket.hyperparameters.data(), scaling));
    }
  }
  step_cpu(bucket.table(), bucket.dtypes, bucket.scalars.data(), threads, instruction_sets()[0]);
}

void Plan::commit() {
  for (const Bucket& bucket : buckets_) {
    if (bucket.capturable) continue;
    for (size_t i = 0; i < bucket.counters.size(); ++i) {
      const Counter& counter = bucket.counters[i];
      const double step = bucket.counts[static_cast<size_t>(bucket.segments[i].scalars)].step;
      if (counter.step) write_count(counter.step, counter.dtype, step);
    }
  }
}

void Plan::run_cpu(int threads) {
  for (const Bucket* bucket : buckets()) {
    if (bucket->device.type != kCPU) throw std::invalid_argument("a bucket is not on the CPU");
  }
  begin();
  for (Bucket* bucket : buckets()) run_bucket(*bucket, threads);
  commit();
}

void Plan::release() {
  for (Bucket& bucket : buckets_) bucket.release();
  items_.clear();
  item_of_.clear();
  groups_.clear();
  owners_.clear();
  written_.clear();
  row_ = Tensors();
  begun_ = false;
}

}  // namespace radam
