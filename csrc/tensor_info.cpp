// Recent versions of torch offer DLPack's C exchange API: a table of C functions, one of which
// describes a tensor in some 50 ns. The structures below are that standard's binary interface
// (DLPack 1.3). Older versions are asked through their Python attributes.
#include "tensor_info.h"

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

int dtype_of(const DLDataType& type) {
  constexpr uint8_t kFloat = 2, kBfloat = 4;
  if (type.lanes != 1) return -1;
  if (type.code == kFloat && type.bits == 32) return kFloat32;
  if (type.code == kFloat && type.bits == 64) return kFloat64;
  if (type.code == kFloat && type.bits == 16) return kFloat16;
  if (type.code == kBfloat && type.bits == 16) return kBFloat16;
  return -1;
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
  info.dtype = dtype_of(t.dtype);
  info.ndim = t.ndim;
  if (info.ndim > kMaxDims) return false;
  info.sizes = t.shape;
  info.strides = t.strides;
  info.numel = count(info);
  return true;
}

// Interned once and never released.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
};

bool describe_by_attributes(PyObject* tensor, TensorInfo& info) try {
  static const Names names;
  const auto get = [&](PyObject* name) { return Ref::steal(PyObject_GetAttr(tensor, name)); };
  const auto call = [&](PyObject* name) {
    return Ref::steal(PyObject_CallMethodNoArgs(tensor, name));
  };
  info.dtype = dtype_code(get(names.dtype).get());
  if (get(names.is_cpu).get() == Py_True) {
    info.device = {kCPU, 0};
  } else {
    info.device.type = get(names.is_cuda).get() == Py_True ? kCUDA : -1;
    info.device.index = static_cast<int32_t>(to_int(call(names.get_device).get()));
  }
  const Ref sizes = get(names.shape), strides = call(names.stride);
  info.ndim = static_cast<int32_t>(PyTuple_Size(sizes.get()));
  if (info.ndim < 0) throw PythonError();
  if (info.ndim > kMaxDims) return false;
  for (int i = 0; i < info.ndim; ++i) {
    info.storage[i] = to_int(PyTuple_GetItem(sizes.get(), i));
    info.storage[kMaxDims + i] = to_int(PyTuple_GetItem(strides.get(), i));
  }
  info.sizes = info.storage;
  info.strides = info.storage + kMaxDims;
  info.numel = count(info);
  info.data = static_cast<char*>(PyLong_AsVoidPtr(call(names.data_ptr).get()));
  return !PyErr_Occurred();
} catch (const PythonError&) {
  return false;
}

}  // namespace

int dtype_code(PyObject* torch_dtype) {
  // Never released: static Python objects must not be destroyed after the interpreter.
  static PyObject* const* dtypes = [] {
    auto* found = new PyObject*[kDTypes];
    const Ref torch = Ref::steal(PyImport_ImportModule("torch"));
    for (int i = 0; i < kDTypes; ++i) found[i] = attribute(torch.get(), kDTypeNames[i]).release();
    return found;
  }();
  for (int i = 0; i < kDTypes; ++i) {
    if (dtypes[i] == torch_dtype) return i;
  }
  return -1;
}

bool describe(PyObject* tensor, TensorInfo& info) {
  const DLPackExchangeAPI* api = exchange_api();
  if (api ? describe_by_dlpack(*api, tensor, info) : describe_by_attributes(tensor, info)) {
    return info.data != nullptr || info.numel == 0;
  }
  // A wish to stop is not a fact about the tensor.
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
  // A permutation: from the innermost, every stride is the product of the sizes within.
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
