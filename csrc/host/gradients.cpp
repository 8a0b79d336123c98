// Reads the gradients of an optimizer, and tells later whether they are still the same.
#include "host/gradients.h"

#include <stdexcept>
#include <unordered_map>

#include "cpu/step_cpu.h"
#include "host/dtensor.h"

namespace radam {
namespace {

// The descriptor of a property of torch.Tensor that C implements, called directly.
class Property {
 public:
  explicit Property(PyObject* name) : name_(name) {
    // Without an import, which could run Python code, and so other threads.
    Ref type = Ref::borrow(find_class("torch.nn", "Parameter"));
    Ref found = attribute(type.get(), name);
    if (!PyObject_TypeCheck(found.get(), &PyGetSetDescr_Type)) return;
    getset_ = reinterpret_cast<PyGetSetDescrObject*>(found.release())->d_getset;
    parameter_ = reinterpret_cast<PyTypeObject*>(type.release());
    tensor_ = parameter_->tp_base;
  }

  Ref operator()(PyObject* tensor) const {
    PyTypeObject* type = Py_TYPE(tensor);
    if (getset_ && (type == parameter_ || type == tensor_ || is_dtensor(tensor))) {
      return Ref::steal(getset_->get(tensor, getset_->closure));
    }
    return attribute(tensor, name_);
  }

 private:
  PyObject* name_;
  PyTypeObject *tensor_ = nullptr, *parameter_ = nullptr;
  PyGetSetDef* getset_ = nullptr;
};

// The version counter of a tensor; -1 for tensors without one, made in inference mode. That of a
// DTensor does not count what is written to its local tensor, as FSDP2 does to accumulate.
int64_t version_of(PyObject* tensor) {
  static const Property version(RADAM_STR(_version));
  try {
    const int64_t own = to_int(version(tensor).get());
    const Ref local = is_dtensor(tensor) ? local_tensor(tensor) : Ref();
    return local.get() ? own + to_int(version(local.get()).get()) : own;
  } catch (const PythonError&) {
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw;
    PyErr_Clear();
    return -1;
  }
}

constexpr int64_t kSmallBytes = 1 << 16;

// What a weak reference refers to, only to be compared; None or null if that is gone.
const PyObject* referent(const Ref& weak) {
  if (!weak.get()) return nullptr;
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(weak.get(), &found) < 0) throw PythonError();
  Py_XDECREF(found);
  return found;
#else
  return PyWeakref_GetObject(weak.get());
#endif
}

// Calls visit(parameter, position) for every parameter of `groups`.
template <typename Visit>
void for_each_parameter(PyObject* groups, const Visit& visit) {
  const Ref all = as_tuple(groups, "param_groups: expected a list of dicts");
  size_t position = 0;
  for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(all.get()); ++g) {
    PyObject* group = PyTuple_GET_ITEM(all.get(), g);
    if (!PyDict_Check(group)) throw std::invalid_argument("param_groups: expected a list of dicts");
    const Ref found = item(group, RADAM_STR(params));
    if (!found.get()) throw std::invalid_argument("a parameter group has no \"params\"");
    const Ref params = as_tuple(found.get(), "\"params\": expected a list of tensors");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(params.get()); ++i, ++position) {
      visit(Ref::borrow(PyTuple_GET_ITEM(params.get(), i)), position);
    }
  }
}

}  // namespace

Ref gradient(PyObject* param) {
  static const Property grad(RADAM_STR(grad));
  return grad(param);
}

Ref as_tuple(PyObject* object, const char* message) {
  const Ref sequence = Ref::steal(PySequence_Fast(object, message));
  return Ref::steal(PySequence_Tuple(sequence.get()));
}

double GradientBucket::power_sum(double norm_type, int threads, int isa) const {
  const Norm norm = norm_of_order(norm_type);
  if (device.type != kCPU) throw std::invalid_argument("the bucket is not on the CPU");
  const GilReleased released;
  return norm_cpu(rows, dtype, norm, threads, instruction_sets().at(static_cast<size_t>(isa)));
}

Ref Gradients::refresh(PyObject* groups, PyObject* replaced) {
  release();
  marks_.clear();
  find_dtensor();
  const Ref pending = Ref::steal(PyList_New(0));
  for_each_parameter(groups, [&](const Ref& owner, size_t) {
    Ref grad = gradient(owner.get());
    marks_.emplace_back();
    if (grad.get() == Py_None) return;
    marks_.back() = {Ref::steal(PyWeakref_NewRef(grad.get(), nullptr)), version_of(grad.get())};
    Ref local;
    if (PyDict_GET_SIZE(replaced) > 0) {
      const Ref key = Ref::steal(PyLong_FromVoidPtr(owner.get()));
      const Ref pair = item(replaced, key.get());
      if (pair.get()) {
        grad = Ref::borrow(PyTuple_GET_ITEM(pair.get(), 0));
        local = Ref::borrow(PyTuple_GET_ITEM(pair.get(), 1));
      }
    }
    if (const char* reason = add(owner, grad, local)) {
      const Ref left = Ref::steal(Py_BuildValue("(OOs)", owner.get(), grad.get(), reason));
      if (PyList_Append(pending.get(), left.get()) != 0) throw PythonError();
    }
  });
  return Ref::borrow(pending.get());
}

// Adds a gradient to its bucket, or returns why its memory can't be read.
const char* Gradients::add(const Ref& owner, const Ref& grad, const Ref& given) {
  Ref spec, local = Ref::borrow(given.get());
  if (is_dtensor(grad.get())) {
    spec = spec_of(grad.get());
    if (!local.get()) local = local_tensor(grad.get());
    if (!local.get()) return "it has no plain local tensor";
  } else if (!local.get()) {
    local = Ref::borrow(grad.get());
  }
  if (!describe(local.get(), info_) || info_.dtype < 0) {
    return "it has no memory that a kernel can use";
  }
  if (!is_dense(info_)) return "it is not dense";
  const bool low = reinterpret_cast<uintptr_t>(info_.data) < kLowestAddress;
  // As in the walk: a full check of small gradients would take longer than all else.
  if (info_.numel > 0 && (low || info_.bytes() > kSmallBytes)) {
    if (low && find_lazy(local.get(), info_)) return "it has no memory";
    if (const char* reason = find_short_storage(local.get(), info_)) return reason;
  }
  GradientBucket& bucket = bucket_of(info_, spec);
  if (bucket.rows.empty()) filled_.push_back(&bucket);
  bucket.rows.push_back({info_.data, info_.reals()});
  bucket.owners.push_back(Ref::borrow(owner.get()));
  bucket.grads.push_back(Ref::borrow(grad.get()));
  bucket.tensors.push_back(std::move(local));
  return nullptr;
}

GradientBucket& Gradients::bucket_of(const TensorInfo& info, const Ref& spec) {
  Ref mesh, placements;
  if (spec.get()) {
    mesh = attribute(spec.get(), RADAM_STR(mesh));
    placements = attribute(spec.get(), RADAM_STR(placements));
  }
  const auto same = [](const Ref& a, const Ref& b) {
    if (!a.get() || !b.get()) return a.get() == b.get();
    return equal(a, b);
  };
  for (GradientBucket& bucket : buckets_) {
    if (bucket.device == info.device && bucket.dtype == info.dtype &&
        bucket.complex == info.complex && same(bucket.mesh, mesh) &&
        same(bucket.placements, placements)) {
      return bucket;
    }
  }
  GradientBucket& bucket = buckets_.emplace_back();
  bucket.device = info.device;
  bucket.dtype = static_cast<DType>(info.dtype);
  bucket.complex = info.complex;
  bucket.mesh = std::move(mesh);
  bucket.placements = std::move(placements);
  return bucket;
}

Gradients::Comparison Gradients::compare(PyObject* groups) const {
  Comparison found;
  std::unordered_map<const PyObject*, const Mark*> by_object;  // if parameters have moved
  const auto find = [&](size_t position, const PyObject* grad) -> const Mark* {
    if (position < marks_.size() && referent(marks_[position].weak) == grad) {
      return &marks_[position];
    }
    if (by_object.empty()) {
      for (const Mark& mark : marks_) by_object.emplace(referent(mark.weak), &mark);
    }
    const auto at = by_object.find(grad);
    return at == by_object.end() ? nullptr : at->second;
  };
  for_each_parameter(groups, [&](const Ref& owner, size_t position) {
    const Ref grad = gradient(owner.get());
    if (grad.get() == Py_None) return;
    const Mark* const mark = find(position, grad.get());
    if (!mark) {
      ++found.replaced;
    } else if (version_of(grad.get()) != mark->version) {
      found.changed = Ref::borrow(owner.get());
    } else {
      ++found.same;
    }
  });
  return found;
}

void Gradients::release() {
  filled_.clear();
  for (GradientBucket& bucket : buckets_) {
    bucket.rows.clear();
    bucket.owners.clear();
    bucket.grads.clear();
    bucket.tensors.clear();
  }
}

}  // namespace radam
