// FSDP2 gives gradient and parameter the same spec object, so comparing pointers is usually enough.
// Otherwise the fields of the specs are compared, because `spec == spec` computes hashes in 0.4 us.
#include "host/dtensor.h"

#include <structmember.h>

namespace radam {
namespace {

PyObject* dtensor_class = nullptr;  // written under the GIL

// An attribute of DTensor that is one of its __slots__. A slot is read at its offset, without a
// lookup in every base class.
class Slot {
 public:
  Slot(PyObject* name) : name_(name) {
    PyObject* found = PyObject_GetAttr(dtensor_class, name);
    if (!found) {
      PyErr_Clear();
    } else if (Py_IS_TYPE(found, &PyMemberDescr_Type)) {
      const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found)->d_member;
      if (member->type == T_OBJECT_EX) offset_ = member->offset;
    }
  }

  Ref operator()(PyObject* dtensor) const {
    if (offset_ > 0) {
      PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(dtensor) + offset_);
      if (value) return Ref::borrow(value);
    }
    return attribute(dtensor, name_);
  }

 private:
  PyObject* name_;
  Py_ssize_t offset_ = 0;
};

// None in older versions of torch.
Ref shard_order(PyObject* spec) {
  PyObject* found = PyObject_GetAttr(spec, RADAM_STR(shard_order));
  if (found) return Ref::steal(found);
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError();
  PyErr_Clear();
  return Ref::borrow(Py_None);
}

}  // namespace

void find_dtensor() {
  if (!dtensor_class) dtensor_class = find_class("torch.distributed.tensor", "DTensor");
}

bool is_dtensor(PyObject* object) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == dtensor_class;
}

Ref local_tensor(PyObject* dtensor) {
  static PyObject* const plain = find_class("torch", "Tensor");
  static const Slot slot(RADAM_STR(_local_tensor));
  Ref local = slot(dtensor);
  return reinterpret_cast<PyObject*>(Py_TYPE(local.get())) == plain ? std::move(local) : Ref();
}

Ref spec_of(PyObject* dtensor) {
  static const Slot slot(RADAM_STR(_spec));
  return slot(dtensor);
}

bool equal(const Ref& a, const Ref& b) {
  const int same = PyObject_RichCompareBool(a.get(), b.get(), Py_EQ);
  if (same < 0) throw PythonError();
  return same == 1;
}

bool same_placement(PyObject* a, PyObject* b) {
  const Ref spec = spec_of(a), other = spec_of(b);
  if (spec.get() == other.get()) return true;
  for (PyObject* name : {RADAM_STR(mesh), RADAM_STR(placements)}) {
    if (!equal(attribute(spec.get(), name), attribute(other.get(), name))) return false;
  }
  const auto shape = [](const Ref& spec) {
    return attribute(attribute(spec.get(), RADAM_STR(tensor_meta)).get(), RADAM_STR(shape));
  };
  return equal(shape(spec), shape(other)) &&
         equal(shard_order(spec.get()), shard_order(other.get()));
}

}  // namespace radam
