// The walk over an optimizer's parameters.
//
// Everything that a step depends on is read at every step, in one pass, so no edit between steps
// (gradients, pointers, state, step counts) is missed. The last step leaves hints: where a
// parameter's state is, which addresses to prefetch, and for which tensors check_memory() can be
// skipped because nothing has changed.
#include <stdexcept>

#include "host/dtensor.h"
#include "host/gradients.h"
#include "host/plan.h"

namespace radam {
namespace {

// How many parameters ahead of the walk to prefetch.
constexpr size_t kAhead = 4;

void append_to(PyObject* list, PyObject* object) {
  if (PyList_Append(list, object) != 0) throw PythonError();
}

// Prefetches a line at or near an address. That may be stale or null, so nothing is added to the
// pointer itself.
void prefetch_near(const void* address, intptr_t offset) {
  const uintptr_t line = reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(offset);
  __builtin_prefetch(reinterpret_cast<const void*>(line));
}

Ref text(const char* stream, const char* reason) {
  return Ref::steal(PyUnicode_FromFormat("%s%s", stream, reason));
}

}  // namespace

void Plan::start() {
  release();
  find_dtensor();
}

Ref Plan::refresh(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* scaling,
                  uint32_t first_ordinal) {
  start();
  const Ref pending = Ref::steal(PyList_New(0));
  const Ref all = as_tuple(groups, "param_groups: expected a list of dicts");
  if (!PyDict_Check(state)) throw std::invalid_argument("state: expected a dict of dicts");
  walk(all.get(), state, repaired, pending.get(), first_ordinal);
  if (PyList_GET_SIZE(pending.get()) == 0) complete(all.get(), scaling);
  return Ref::borrow(pending.get());
}

void Plan::walk(PyObject* groups, PyObject* state, PyObject* repaired, PyObject* pending,
                uint32_t first_ordinal) {
  for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(groups); ++g) {
    PyObject* options = PyTuple_GET_ITEM(groups, g);
    if (!PyDict_Check(options)) {
      throw std::invalid_argument("param_groups[" + std::to_string(g) + "]: expected a dict");
    }
    add_group(options);
    const Ref found = item(options, RADAM_STR(params));
    if (!found.get()) {
      throw std::invalid_argument("param_groups[" + std::to_string(g) + "] has no \"params\"");
    }
    groups_.back().params =
        as_tuple(found.get(), "\"params\" of a parameter group: expected a list of tensors");
  }
  // Copied after the parameters: one created later, at the address of a deleted key, can't match.
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
      entry.ordinal = first_ordinal + static_cast<uint32_t>(position);
      if (grad.get() == Py_None) continue;
      Reason reason = {"it has no state"};
      const int64_t group = static_cast<int64_t>(g);
      if (find_replacement(repaired, owner.get())) {
        reason = add_row(owner, group, entry);
      } else if (find_row(find_state(owner.get(), entry))) {
        row_[kParam] = Ref::borrow(owner.get());
        row_[kGrad] = Ref::borrow(grad.get());
        reason = add_row(owner, group, entry);
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
                          PyObject* exp_avg_sqs, double step, PyObject* group, PyObject* scaling) {
  start();
  const Ref pending = Ref::steal(PyList_New(0));
  add_group(group);
  groups_.back().caller_counts = true;
  count_ = step;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    const auto part = [&](PyObject* list) { return Ref::borrow(PyList_GetItem(list, i)); };
    const Ref owner = part(params);
    row_ = {};
    row_[kParam] = part(params);
    row_[kGrad] = part(grads);
    row_[kExpAvg] = part(exp_avgs);
    row_[kExpAvgSq] = part(exp_avg_sqs);
    written_.push_back(part(exp_avgs));
    written_.push_back(part(exp_avg_sqs));
    Entry entry;
    if (const Reason reason = add_row(owner, 0, entry)) {
      const Ref left =
          Ref::steal(Py_BuildValue("(nN)", i, text(reason.stream, reason.text).release()));
      append_to(pending.get(), left.get());
    }
  }
  if (PyList_GET_SIZE(pending.get()) == 0) {
    const Ref groups = Ref::steal(Py_BuildValue("[O]", group));
    complete(groups.get(), scaling);
  }
  return Ref::borrow(pending.get());
}

bool Plan::step_parameter(PyObject* group, PyObject* param, PyObject* state, PyObject* scaling,
                          int threads, uint32_t ordinal) try {
  start();
  const struct Release {
    Plan& plan;
    ~Release() {
      const bool begun = plan.begun_;  // for the caller, if this throws
      plan.release();
      plan.begun_ = begun;
    }
  } at_the_end = {*this};
  add_group(group);
  const size_t position = visit(param, state);
  const Ref owner = Ref::borrow(param);
  Ref grad = gradient(param);
  if (grad.get() == Py_None || !find_row(state)) return false;
  row_[kParam] = Ref::borrow(param);
  row_[kGrad] = std::move(grad);
  Entry& entry = visits_[position].entry;
  entry.ordinal = ordinal;
  if (add_row(owner, 0, entry) || !on_cpu()) return false;
  const Ref groups = Ref::steal(Py_BuildValue("(O)", group));
  complete(groups.get(), scaling);
  run_cpu(threads);
  return true;
} catch (const Refusal&) {
  return false;
} catch (const InvalidGroup&) {
  return false;
}

void Plan::add_group(PyObject* options) {
  const auto given = [&](PyObject* name) {
    Ref found = item(options, name);
    return found.get() == Py_None ? Ref() : std::move(found);
  };
  groups_.emplace_back();
  Group& group = groups_.back();
  group.options = Ref::borrow(options);
  bool good = true;
  FormatOptions& formats = group.formats;
  if (const Ref dtype = given(RADAM_STR(state_dtype)); dtype.get()) {
    formats.state_dtype = format_code(dtype.get());
    good = (formats.state_dtype >= 0 && formats.state_dtype < kFloat64) ||
           formats.state_dtype == kBlock8;
  }
  if (const Ref bits = given(RADAM_STR(master_weights)); bits.get()) {
    const double number = to_double(bits.get());
    formats.master_weights = number == 24 ? 24 : 32;
    good = good && (number == 24 || number == 32);
  }
  const Ref stochastic = given(RADAM_STR(stochastic_rounding));
  formats.stochastic_rounding = stochastic.get() && to_bool(stochastic.get());
  const bool sixteen = formats.stochastic_rounding || formats.master_weights;
  if (!good || (sixteen && formats.state_dtype == kFloat16)) {
    throw InvalidGroup{static_cast<int64_t>(groups_.size()) - 1, 1.0};
  }
  const Ref capturable = given(RADAM_STR(capturable));
  group.capturable = capturable.get() && to_bool(capturable.get());
}

// The value of `param` in the optimizer's state; null if it has none. Most items are where they
// were at the last step; a dict lookup would hash the parameter, which runs Python code.
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

// Fills row_ with the replacements for a parameter; false if it has none.
bool Plan::find_replacement(PyObject* repaired, PyObject* owner) {
  if (PyDict_GET_SIZE(repaired) == 0) return false;
  const Ref key = Ref::steal(PyLong_FromVoidPtr(owner));
  const Ref found = item(repaired, key.get());
  if (!found.get()) return false;
  if (PyTuple_Size(found.get()) != kStreams + 1) {
    throw std::invalid_argument("repaired: expected tuples of the owner and of each stream");
  }
  for (int i = 0; i < kStreams; ++i) {
    PyObject* const tensor = PyTuple_GET_ITEM(found.get(), i + 1);  // after the owner
    row_[i] = tensor == Py_None ? Ref() : Ref::borrow(tensor);
  }
  return true;
}

// Fills row_ from a parameter's state; false if a moment or the step is missing.
bool Plan::find_row(PyObject* state) {
  if (!state || !PyDict_Check(state)) return false;
  PyObject *keys[3], *values[3];
  Py_ssize_t position = 0;
  int n = 0;
  while (n < 3 && PyDict_Next(state, &position, &keys[n], &values[n])) ++n;
  // Nearly always in the order of insertion, and with interned names as keys.
  if (n == 3 && keys[0] == RADAM_STR(step) && keys[1] == RADAM_STR(exp_avg) &&
      keys[2] == RADAM_STR(exp_avg_sq)) {
    row_[kStep] = Ref::borrow(values[0]);
    row_[kExpAvg] = Ref::borrow(values[1]);
    row_[kExpAvgSq] = Ref::borrow(values[2]);
  } else {
    row_[kStep] = item(state, RADAM_STR(step));
    row_[kExpAvg] = item(state, RADAM_STR(exp_avg));
    row_[kExpAvgSq] = item(state, RADAM_STR(exp_avg_sq));
  }
  for (int i = kPlainStreams; i < kStreams; ++i) row_[i] = Ref();
  if (PyDict_GET_SIZE(state) > 3) {
    row_[kRemainder] = item(state, RADAM_STR(param_remainder));
    row_[kExpAvgExponent] = item(state, RADAM_STR(exp_avg_exponent));
    row_[kExpAvgSqExponent] = item(state, RADAM_STR(exp_avg_sq_exponent));
  }
  return row_[kStep].get() && row_[kExpAvg].get() && row_[kExpAvgSq].get();
}

// Prefetches the table of a dict of three items.
void Plan::prefetch_keys(const void* keys) {
  for (int line = 0; line < 3; ++line) prefetch_near(keys, 64 * line);
}

// The position of a parameter in the order of the last backward, which is mostly that of this one.
// Prefetches what the later ones will read.
size_t Plan::visit(PyObject* param, PyObject* state) {
  if (next_ >= visits_.size() || visits_[next_].param != param) {
    const auto [found, is_new] = visit_of_.emplace(param, visits_.size());
    next_ = found->second;
    if (is_new) {
      visits_.push_back({param});
    }
  }
  const size_t position = next_++;
  if (next_ == visits_.size()) next_ = 0;
  Visit& now = visits_[position];
  now.state = state;
  now.keys = PyDict_Check(state) ? reinterpret_cast<PyDictObject*>(state)->ma_keys : nullptr;
  const Visit& later = visits_[next_];
  __builtin_prefetch(later.state);
  prefetch_keys(later.keys);
  prefetch_tensors(later.entry);
  for (int stream : {kParam, kExpAvg, kExpAvgSq}) {
    const void* const data = later.entry.seen[stream].data;
    for (int line = 1; line < 4; ++line) prefetch_near(data, 64 * line);
  }
  return position;
}

// Prefetches what the walk will read for a later parameter, because in training the caches are
// cold. Prefetching a stale address is harmless.
void Plan::prefetch(size_t position) const {
  const auto state_of = [&](size_t at) -> PyObject* {
    if (at >= entries_.size() || entries_[at].item >= items_.size()) return nullptr;
    return items_[entries_[at].item].second.get();
  };
  if (PyObject* state = state_of(position + 2 * kAhead)) __builtin_prefetch(state);
  if (position + kAhead >= entries_.size()) return;
  PyObject* state = state_of(position + kAhead);
  if (state && PyDict_Check(state)) {
    prefetch_keys(reinterpret_cast<PyDictObject*>(state)->ma_keys);
  }
  prefetch_tensors(entries_[position + kAhead]);
}

void Plan::prefetch_tensors(const Entry& entry) {
  const auto prefetch = [](const Seen& seen) {
    __builtin_prefetch(seen.object);
    __builtin_prefetch(seen.impl);
    prefetch_near(seen.impl, -64);
    prefetch_near(seen.impl, 64);
    __builtin_prefetch(seen.data);
  };
  for (const Seen& seen : entry.seen) prefetch(seen);
  if (!entry.low_memory) return;
  for (const Seen& seen : entry.low_memory->seen) prefetch(seen);
}

}  // namespace radam
