// Reads the options of a parameter group; what is out of range is not its business.
#include "hyperparameters.h"

#include <stdexcept>

namespace radam {
namespace {

// Names that a step looks up, interned once and never released.
struct Names {
#define RADAM_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  RADAM_NAME(betas);
  RADAM_NAME(decoupled_weight_decay);
  RADAM_NAME(degenerated_to_sgd);
  RADAM_NAME(eps);
  RADAM_NAME(exact);
  RADAM_NAME(first_order);
  RADAM_NAME(grad_scale);
  RADAM_NAME(lr);
  RADAM_NAME(maximize);
  RADAM_NAME(rectification);
  RADAM_NAME(rho_threshold);
  RADAM_NAME(weight_decay);
#undef RADAM_NAME
};

// A borrowed item of a dict that must be there.
PyObject* required(PyObject* dict, PyObject* key) {
  PyObject* found = item(dict, key);
  if (!found) {
    PyErr_SetObject(PyExc_KeyError, key);
    throw PythonError();
  }
  return found;
}

// A number, or a tensor of one element.
double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double x = PyFloat_AsDouble(value);
  if (x == -1.0 && PyErr_Occurred()) throw PythonError();
  return x;
}

bool flag(PyObject* group, PyObject* key) {
  const int truth = PyObject_IsTrue(required(group, key));
  if (truth < 0) throw PythonError();
  return truth != 0;
}

void read_lr(PyObject* lr, Hyperparameters& h, const Device* device) {
  h.lr_data = nullptr;
  h.lr_dtype = 0;
  TensorInfo info;
  if (device && !PyFloat_CheckExact(lr) && describe(lr, info) && info.numel == 1 &&
      info.dtype >= 0 && (info.device.type != kCPU || device->type == kCPU)) {
    if (!(info.device == *device)) {
      throw std::invalid_argument(
          "lr is a tensor on another device than a parameter of its group; give a number, or a "
          "tensor on the CPU");
    }
    h.lr = 0.0;
    h.lr_data = info.data;
    h.lr_dtype = info.dtype;
  } else {
    h.lr = number(lr);
  }
}

}  // namespace

bool read_hyperparameters(PyObject* group, Hyperparameters& h, const Device* device) {
  static const Names n;
  const Ref betas = Ref::steal(PySequence_Tuple(required(group, n.betas)));
  if (PyTuple_GET_SIZE(betas.get()) != 2) return false;
  PyObject* form = required(group, n.rectification);
  if (!PyUnicode_Check(form)) return false;
  h.exact = PyUnicode_Compare(form, n.exact) == 0;
  if (!h.exact && PyUnicode_Compare(form, n.first_order) != 0) return false;
  PyObject* grad_scale = item(group, n.grad_scale);
  h.grad_scale = grad_scale ? number(grad_scale) : 1.0;
  h.beta1 = number(PyTuple_GET_ITEM(betas.get(), 0));
  h.beta2 = number(PyTuple_GET_ITEM(betas.get(), 1));
  read_lr(required(group, n.lr), h, device);
  h.eps = number(required(group, n.eps));
  h.weight_decay = number(required(group, n.weight_decay));
  h.rho_threshold = number(required(group, n.rho_threshold));
  h.decoupled_weight_decay = flag(group, n.decoupled_weight_decay);
  h.maximize = flag(group, n.maximize);
  h.degenerated_to_sgd = flag(group, n.degenerated_to_sgd);
  return true;
}

}  // namespace radam
