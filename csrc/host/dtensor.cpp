// FSDP2 gives gradient and parameter the same spec object, so comparing pointers is usually enough.
// Otherwise the fields of the specs are compared, because `spec == spec` computes hashes in 0.4 us.
#include "host/dtensor.h"

namespace radam {
namespace {

// Interned once and never released.
struct Names {
#define RADAM_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  RADAM_NAME(_local_tensor);
  RADAM_NAME(_spec);
  RADAM_NAME(mesh);
  RADAM_NAME(placements);
  RADAM_NAME(shape);
  RADAM_NAME(shard_order);
  RADAM_NAME(tensor_meta);
#undef RADAM_NAME
};

const Names& names() {
  static const Names interned;
  return interned;
}

PyObject* dtensor_class = nullptr;  // written under the GIL

Ref get(PyObject* object, PyObject* name) { return Ref::steal(PyObject_GetAttr(object, name)); }

// An attribute that older versions of torch lack: None then.
Ref get_optional(PyObject* object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object, name);
  if (found) return Ref::steal(found);
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError();
  PyErr_Clear();
  return Ref::borrow(Py_None);
}

bool equal(const Ref& a, const Ref& b) {
  const int same = PyObject_RichCompareBool(a.get(), b.get(), Py_EQ);  // true for one object
  if (same < 0) throw PythonError();
  return same == 1;
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
  Ref local = get(dtensor, names()._local_tensor);
  return reinterpret_cast<PyObject*>(Py_TYPE(local.get())) == plain ? std::move(local) : Ref();
}

bool same_placement(PyObject* a, PyObject* b) {
  const Ref spec = get(a, names()._spec), other = get(b, names()._spec);
  if (spec.get() == other.get()) return true;
  for (PyObject* name : {names().mesh, names().placements}) {
    if (!equal(get(spec.get(), name), get(other.get(), name))) return false;
  }
  const Ref meta = get(spec.get(), names().tensor_meta),
            other_meta = get(other.get(), names().tensor_meta);
  return equal(get(meta.get(), names().shape), get(other_meta.get(), names().shape)) &&
         equal(get_optional(spec.get(), names().shard_order),
               get_optional(other.get(), names().shard_order));
}

}  // namespace radam
