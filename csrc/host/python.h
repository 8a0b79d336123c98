// Wrappers of Python's C API for the walk. pybind11 is used in bind/ only: its headers dominate the
// build time, and its objects add overhead to a step.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <utility>

namespace radam {

// Thrown when a Python exception is set, which the bindings then raise.
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

// Releases the GIL while it exists.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { PyEval_RestoreThread(state_); }
  GilReleased(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

// The Python string `name`, interned once and never released.
#define RADAM_STR(name)                                                  \
  ([] {                                                                  \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                     \
  }())

inline Ref attribute(PyObject* object, const char* name) {
  return Ref::steal(PyObject_GetAttrString(object, name));
}

inline Ref attribute(PyObject* object, PyObject* name) {
  return Ref::steal(PyObject_GetAttr(object, name));
}

// An item of a dict; empty if there is none. Owned, because Python code or other threads that run
// later can remove it from the dict.
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

// The value of a number or of a tensor of one element.
inline double to_double(PyObject* number) {
  if (PyFloat_CheckExact(number)) return PyFloat_AS_DOUBLE(number);
  const double value = PyFloat_AsDouble(number);
  if (value == -1.0 && PyErr_Occurred()) throw PythonError();
  return value;
}

inline bool to_bool(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw PythonError();
  return truth == 1;
}

// The class `name` of `module`, or null until that is imported. Never released.
inline PyObject* find_class(const char* module, const char* name) {
  const Ref loaded = Ref::borrow(PyDict_GetItemString(PyImport_GetModuleDict(), module));
  if (!loaded.get()) return nullptr;
  PyObject* found = PyObject_GetAttrString(loaded.get(), name);
  if (!found) PyErr_Clear();  // the import has not finished
  return found;
}

}  // namespace radam
