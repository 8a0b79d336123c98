// Reads the options of a parameter group. Range checks are in valid().
#include "host/options.h"

#include <stdexcept>

namespace radam {
namespace {

// An option of a group. Those that torch.optim.RAdam lacks are in a group only if they differ from
// their default. KeyError for any other that is missing.
Ref option(PyObject* group, PyObject* key) {
  static PyObject* const optional =
      attribute(Ref::steal(PyImport_ImportModule("radam_kernels.hyperparameters")).get(),
                "OPTIONAL")
          .release();
  Ref found = item(group, key);
  if (!found.get()) found = item(optional, key);
  if (!found.get()) {
    PyErr_SetObject(PyExc_KeyError, key);
    throw PythonError();
  }
  return found;
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
  h.lr = to_double(lr);
  return false;
}

// Applies decouple_lr: the decay becomes 1 - weight_decay * lr / initial_lr, and kernels need no
// option of their own for it. False if the group does not allow it.
bool divide_by_initial_lr(PyObject* group, Hyperparameters& h) {
  const Ref found = item(group, RADAM_STR(initial_lr));
  const double initial_lr = found.get() ? to_double(found.get()) : 0.0;
  h.weight_decay /= initial_lr;
  return h.decoupled_weight_decay && initial_lr > 0.0;
}

}  // namespace

bool read_hyperparameters(PyObject* group, Hyperparameters& h, const Device* device,
                          Ref* lr_tensor) {
  const Ref betas = Ref::steal(PySequence_Tuple(option(group, RADAM_STR(betas)).get()));
  if (PyTuple_GET_SIZE(betas.get()) != 2) return false;
  const Ref form = option(group, RADAM_STR(rectification));
  if (!PyUnicode_Check(form.get())) return false;
  h.exact = PyUnicode_CompareWithASCIIString(form.get(), "exact") == 0;
  if (!h.exact && PyUnicode_CompareWithASCIIString(form.get(), "first_order") != 0) return false;
  const Ref grad_scale = item(group, RADAM_STR(grad_scale));
  h.grad_scale = grad_scale.get() ? to_double(grad_scale.get()) : 1.0;
  h.beta1 = to_double(PyTuple_GET_ITEM(betas.get(), 0));
  h.beta2 = to_double(PyTuple_GET_ITEM(betas.get(), 1));
  Ref lr = option(group, RADAM_STR(lr));
  if (read_lr(lr.get(), h, device)) *lr_tensor = std::move(lr);
#define RADAM_READ_NUMBER(name) h.name = to_double(option(group, RADAM_STR(name)).get());
#define RADAM_READ_FLAG(name) h.name = to_bool(option(group, RADAM_STR(name)).get());
  RADAM_HYPERPARAMETERS(RADAM_READ_NUMBER, RADAM_READ_FLAG)
#undef RADAM_READ_NUMBER
#undef RADAM_READ_FLAG
  return !to_bool(option(group, RADAM_STR(decouple_lr)).get()) || divide_by_initial_lr(group, h);
}

}  // namespace radam
