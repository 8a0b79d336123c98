// The little of Python's C API that the hot walk needs. pybind11 stays in the bind_*.cpp files: its
// headers take most of a build's time, and its objects some of a step's.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <utility>

namespace radam {

// Thrown where a Python error is set; the bindings let Python see that error.
struct PythonError {};

// An owned reference.
class Ref {
 public:
  Ref() = default;
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  // Takes over a new reference; null means that a Python error is set.
  static Ref steal(PyObject* object) {
    if (!object) throw PythonError();
    return Ref(object);
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

inline Ref attribute(PyObject* object, const char* name) {
  return Ref::steal(PyObject_GetAttrString(object, name));
}

// An item of a dict; empty if there is none. Owned, because whatever is called next may be Python
// code, and may let other threads run: either can take it out of the dict.
inline Ref item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw PythonError();
  return Ref::borrow(found);
}

inline int64_t to_int(PyObject* number) {
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

// The class `name` of `module`, or null as long as that is not imported. Never released.
inline PyObject* find_class(const char* module, const char* name) {
  const Ref loaded = Ref::borrow(PyDict_GetItemString(PyImport_GetModuleDict(), module));
  if (!loaded.get()) return nullptr;
  PyObject* found = PyObject_GetAttrString(loaded.get(), name);
  if (!found) PyErr_Clear();  // the import is not over yet
  return found;
}

}  // namespace radam
