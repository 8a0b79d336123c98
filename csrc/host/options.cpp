// Reads the options of a parameter group. Range checks are in valid().
#include "host/options.h"

#include <stdexcept>

namespace radam {
namespace {

// Names that a step looks up, interned once and never released.
struct Names {
#define RADAM_NAME(name) PyObject* name = PyUnicode_InternFromString(#name);
#define RADAM_NAME_OF_FLAG(name) RADAM_NAME(name)
  RADAM_HYPERPARAMETERS(RADAM_NAME, RADAM_NAME_OF_FLAG)
  RADAM_NAME(betas)
  RADAM_NAME(exact)
  RADAM_NAME(first_order)
  RADAM_NAME(grad_scale)
  RADAM_NAME(lr)
  RADAM_NAME(rectification)
#undef RADAM_NAME
#undef RADAM_NAME_OF_FLAG
};

// An item of a dict; KeyError if it is missing.
Ref required(PyObject* dict, PyObject* key) {
  Ref found = item(dict, key);
  if (!found.get()) {
    PyErr_SetObject(PyExc_KeyError, key);
    throw PythonError();
  }
  return found;
}

// The value of a number or of a tensor of one element.
double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double x = PyFloat_AsDouble(value);
  if (x == -1.0 && PyErr_Occurred()) throw PythonError();
  return x;
}

bool flag(PyObject* group, PyObject* key) {
  const int truth = PyObject_IsTrue(required(group, key).get());
  if (truth < 0) throw PythonError();
  return truth != 0;
}

// Reads lr into `h`; true if only its address was stored.
bool read_lr(PyObject* lr, Hyperparameters& h, const Device* device) {
  h.lr_data = nullptr;
  h.lr_dtype = 0;
  TensorInfo info;
  if (device && !PyFloat_CheckExact(lr) && describe(lr, info) && !info.complex &&
      !find_lazy(lr, info) && info.numel == 1 && info.dtype >= 0 &&
      (info.device.type != kCPU || device->type == kCPU)) {
    if (!(info.device == *device)) {
      throw std::invalid_argument(
          "lr is a tensor on another device than a parameter of its group; give a number, or a "
          "tensor on the CPU");
    }
    h.lr = 0.0;
    h.lr_data = info.data;
    h.lr_dtype = info.dtype;
    return true;
  }
  h.lr = number(lr);
  return false;
}

}  // namespace

bool read_hyperparameters(PyObject* group, Hyperparameters& h, const Device* device,
                          Ref* lr_tensor) {
  static const Names n;
  const Ref betas = Ref::steal(PySequence_Tuple(required(group, n.betas).get()));
  if (PyTuple_GET_SIZE(betas.get()) != 2) return false;
  const Ref form = required(group, n.rectification);
  if (!PyUnicode_Check(form.get())) return false;
  h.exact = PyUnicode_Compare(form.get(), n.exact) == 0;
  if (!h.exact && PyUnicode_Compare(form.get(), n.first_order) != 0) return false;
  const Ref grad_scale = item(group, n.grad_scale);
  h.grad_scale = grad_scale.get() ? number(grad_scale.get()) : 1.0;
  h.beta1 = number(PyTuple_GET_ITEM(betas.get(), 0));
  h.beta2 = number(PyTuple_GET_ITEM(betas.get(), 1));
  Ref lr = required(group, n.lr);
  if (read_lr(lr.get(), h, device)) *lr_tensor = std::move(lr);
#define RADAM_READ_NUMBER(name) h.name = number(required(group, n.name).get());
#define RADAM_READ_FLAG(name) h.name = flag(group, n.name);
  RADAM_HYPERPARAMETERS(RADAM_READ_NUMBER, RADAM_READ_FLAG)
#undef RADAM_READ_NUMBER
#undef RADAM_READ_FLAG
  return true;
}

}  // namespace radam
