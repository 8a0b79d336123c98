// Recent versions of torch have DLPack's C exchange API: a table of C functions, one of which
// describes a tensor in some 50 ns. The structures below are its binary interface (DLPack 1.3). In
// older versions, Python attributes of the tensor are read.
#include "host/tensor.h"

#include <algorithm>

namespace radam {
namespace {

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  Device device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
    void* older;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
};

const DLPackExchangeAPI* find_exchange_api() {
  const Ref torch = Ref::steal(PyImport_ImportModule("torch"));
  const Ref tensor = attribute(torch.get(), "Tensor");
  constexpr const char* kName = "dlpack_exchange_api";
  PyObject* capsule = PyObject_GetAttrString(tensor.get(), "__dlpack_c_exchange_api__");
  if (!capsule) PyErr_Clear();
  if (!PyCapsule_IsValid(capsule, kName)) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, kName));
  return api->header.major == 1 && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

const DLPackExchangeAPI* exchange_api() {
  static const DLPackExchangeAPI* const api = find_exchange_api();
  return api;
}

// Sets dtype, complex and integer of `info`.
void set_dtype(TensorInfo& info, const DLDataType& type) {
  constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5;
  info.complex = type.code == kComplex;
  const bool small = type.lanes == 1 && type.bits <= 16;
  info.integer = !small ? 0 : type.code == kInt ? -type.bits : type.code == kUInt ? type.bits : 0;
  const int bits = info.complex ? type.bits / 2 : type.bits;
  const bool real = type.lanes == 1 && (type.code == kFloat || info.complex);
  info.dtype = real && bits == 32                                      ? kFloat32
               : real && bits == 64                                    ? kFloat64
               : real && bits == 16                                    ? kFloat16
               : type.lanes == 1 && type.code == kBfloat && bits == 16 ? kBFloat16
                                                                       : -1;
}

int64_t count(const TensorInfo& info) {
  int64_t numel = 1;
  for (int i = 0; i < info.ndim; ++i) numel *= info.sizes[i];
  return numel;
}

bool describe_by_dlpack(const DLPackExchangeAPI& api, PyObject* tensor, TensorInfo& info) {
  DLTensor t;
  if (api.dltensor_from_py_object_no_sync(tensor, &t) != 0) return false;
  info.data = static_cast<char*>(t.data) + t.byte_offset;
  info.device = t.device;
  set_dtype(info, t.dtype);
  info.ndim = t.ndim;
  if (info.ndim > kMaxDims) return false;
  info.sizes = t.shape;
  info.strides = t.strides;
  info.numel = count(info);
  return true;
}

// Never released: static Python objects must not be destroyed after the interpreter.
PyObject* const* torch_dtypes(const char* const* names, int count) {
  auto* found = new PyObject*[static_cast<size_t>(count)];
  const Ref torch = Ref::steal(PyImport_ImportModule("torch"));
  for (int i = 0; i < count; ++i) found[i] = attribute(torch.get(), names[i]).release();
  return found;
}

bool describe_by_attributes(PyObject* tensor, TensorInfo& info) try {
  static constexpr const char* kComplexNames[] = {"complex64", "complex32", "complex128"};
  static constexpr int kParts[] = {kFloat32, kFloat16, kFloat64};
  static PyObject* const* const complexes = torch_dtypes(kComplexNames, 3);
  static constexpr const char* kIntegerNames[] = {"uint8", "int8", "int16"};
  static constexpr int kBits[] = {8, -8, -16};
  static PyObject* const* const integers = torch_dtypes(kIntegerNames, 3);
  const auto call = [&](const char* name) {
    return Ref::steal(PyObject_CallMethod(tensor, name, nullptr));
  };
  const Ref dtype = attribute(tensor, "dtype");
  info.dtype = dtype_code(dtype.get());
  info.complex = false;
  info.integer = 0;
  for (int i = 0; i < 3; ++i) {
    if (dtype.get() == integers[i]) info.integer = kBits[i];
  }
  for (int i = 0; i < 3; ++i) {
    if (dtype.get() != complexes[i]) continue;
    info.dtype = kParts[i];
    info.complex = true;
  }
  const Ref device = call("__dlpack_device__");  // (DLPack's number, index)
  if (!PyTuple_Check(device.get()) || PyTuple_GET_SIZE(device.get()) != 2) return false;
  info.device = {static_cast<int32_t>(to_int(PyTuple_GET_ITEM(device.get(), 0))),
                 static_cast<int32_t>(to_int(PyTuple_GET_ITEM(device.get(), 1)))};
  const Ref sizes = attribute(tensor, "shape"), strides = call("stride");
  info.ndim = static_cast<int32_t>(PyTuple_Size(sizes.get()));
  if (info.ndim < 0) throw PythonError();
  if (info.ndim > kMaxDims) return false;
  info.storage.clear();
  for (PyObject* numbers : {sizes.get(), strides.get()}) {
    for (int i = 0; i < info.ndim; ++i) {
      info.storage.push_back(to_int(PyTuple_GetItem(numbers, i)));
    }
  }
  info.sizes = info.storage.data();
  info.strides = info.storage.data() + info.ndim;
  info.numel = count(info);
  info.data = static_cast<char*>(PyLong_AsVoidPtr(call("data_ptr").get()));
  return !PyErr_Occurred();
} catch (const PythonError&) {
  return false;
}

// A method of a torch class, without arguments. Calls its C function directly, because a lookup by
// name would double the cost.
class Method {
 public:
  Method(const char* module, const char* type, const char* name)
      : name_(PyUnicode_InternFromString(name)) {
    const Ref owner = attribute(Ref::steal(PyImport_ImportModule(module)).get(), type);
    const Ref found = attribute(owner.get(), name);
    if (!PyObject_TypeCheck(found.get(), &PyMethodDescr_Type)) return;
    const auto* descriptor = reinterpret_cast<PyMethodDescrObject*>(found.get());
    if (descriptor->d_method->ml_flags != METH_NOARGS) return;
    function_ = descriptor->d_method->ml_meth;
    type_ = descriptor->d_common.d_type;  // torch keeps it alive
  }
  Ref operator()(PyObject* self) const {
    // The type is checked because a TorchFunctionMode can return any object from the call before.
    return Ref::steal(function_ && PyObject_TypeCheck(self, type_)
                          ? function_(self, nullptr)
                          : PyObject_CallMethodNoArgs(self, name_));
  }

 private:
  PyObject* name_;  // never released
  PyCFunction function_ = nullptr;
  PyTypeObject* type_ = nullptr;
};

// Whether the tensor's class has a __torch_dispatch__ of its own. Its memory, if it has any, need
// not hold its values then.
bool overrides_dispatch(PyObject* tensor) {
  static PyObject* const plain = find_class("torch", "Tensor");
  static PyObject* const parameter = find_class("torch.nn", "Parameter");
  static PyObject* const disabled = PyObject_GetAttr(plain, RADAM_STR(__torch_dispatch__));
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type == plain || type == parameter) return false;
  PyObject* const found = PyObject_GetAttr(type, RADAM_STR(__torch_dispatch__));
  if (!found) PyErr_Clear();  // not a tensor
  Py_XDECREF(found);          // only compared from here on
  return found != disabled;
}

}  // namespace

int dtype_code(PyObject* dtype) {
  static PyObject* const* const dtypes = torch_dtypes(kDTypeNames, kDTypes);
  for (int i = 0; i < kDTypes; ++i) {
    if (dtypes[i] == dtype) return i;
  }
  for (int i = 0; i < kDTypes && PyUnicode_Check(dtype); ++i) {
    if (PyUnicode_CompareWithASCIIString(dtype, kDTypeNames[i]) == 0) return i;
  }
  return -1;
}

int format_code(PyObject* format) {
  if (PyUnicode_Check(format) &&
      PyUnicode_CompareWithASCIIString(format, kDTypeNames[kBlock8]) == 0) {
    return kBlock8;
  }
  return dtype_code(format);
}

const char* find_lazy(PyObject* tensor, const TensorInfo& info) {
  static const Method is_neg("torch", "Tensor", "is_neg"), is_conj("torch", "Tensor", "is_conj");
  if (is_neg(tensor).get() != Py_False) {
    return " is a negated view (is_neg() is true); call resolve_neg() on it";
  }
  if (info.complex && is_conj(tensor).get() != Py_False) {
    return " is a conjugated view (is_conj() is true); call resolve_conj() on it";
  }
  return nullptr;
}

const char* find_short_storage(PyObject* tensor, const TensorInfo& info) {
  static const Method storage("torch", "Tensor", "untyped_storage"),
      offset("torch", "Tensor", "storage_offset"), nbytes("torch", "UntypedStorage", "nbytes");
  if (info.numel == 0) return nullptr;
  const int64_t item = info.bytes() / info.numel;
  const int64_t end = to_int(offset(tensor).get()) * item + info.bytes();
  if (to_int(nbytes(storage(tensor).get()).get()) >= end) return nullptr;
  return " is a tensor whose storage was freed or shrunk (untyped_storage().resize_()); resize it "
         "back";
}

bool describe(PyObject* tensor, TensorInfo& info) {
  if (overrides_dispatch(tensor)) return false;
  const DLPackExchangeAPI* api = exchange_api();
  if (api ? describe_by_dlpack(*api, tensor, info) : describe_by_attributes(tensor, info)) {
    return info.data != nullptr || info.numel == 0;
  }
  // Let KeyboardInterrupt propagate.
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw PythonError();
  PyErr_Clear();
  return false;
}

bool is_dense(const TensorInfo& info) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int i = info.ndim - 1; i >= 0 && contiguous; --i) {
    if (info.sizes[i] == 1) continue;
    contiguous = info.strides[i] == expected;
    expected *= info.sizes[i];
  }
  if (contiguous || info.numel <= 1) return true;
  // Permuted: from the innermost dimension outwards, each stride is the product of the sizes so
  // far.
  bool used[kMaxDims] = {};
  for (expected = 1; expected < info.numel;) {
    int next = -1;
    for (int i = 0; i < info.ndim; ++i) {
      if (!used[i] && info.sizes[i] != 1 && info.strides[i] == expected) next = i;
    }
    if (next < 0) return false;
    used[next] = true;
    expected *= info.sizes[next];
  }
  return true;
}

bool same_shape(const TensorInfo& a, const TensorInfo& b) {
  return a.ndim == b.ndim && std::equal(a.sizes, a.sizes + a.ndim, b.sizes);
}

bool same_layout(const TensorInfo& a, const TensorInfo& b) {
  for (int i = 0; i < a.ndim; ++i) {
    if (a.strides[i] != b.strides[i] && a.sizes[i] != 1) return false;
  }
  return true;
}

const char* tensors_read_by() { return exchange_api() ? "DLPack" : "Python"; }

}  // namespace radam
