// What a kernel must know of a torch tensor, read without linking to torch.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "host/python.h"

namespace radam {

// DLPack's number for the host; radam_kernels/backends/devices.py has the others.
constexpr int32_t kCPU = 1;

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

constexpr int kMaxDims = 64;  // tensors of more are not described

struct TensorInfo {
  char* data = nullptr;
  Device device{};
  int dtype = -1;        // a DType, that of the parts of a complex number; or -1 for any other
  bool complex = false;  // pairs of dtype
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t numel = 0;              // complex numbers count once
  int64_t storage[2 * kMaxDims];  // of sizes and strides, where torch lends no memory for them

  TensorInfo() = default;
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;

  int64_t reals() const { return complex ? 2 * numel : numel; }
  int64_t bytes() const { return reals() * kDTypeSizes[dtype]; }
};

// Fills `info` from a tensor whose memory can be read and written directly. False, with no Python
// error set, for any other: sparse, meta, a subclass without memory of its own, no tensor.
// Runs no Python code where torch has DLPack's C exchange API (2.10 and later).
bool describe(PyObject* tensor, TensorInfo& info);

// Why a tensor's memory does not hold its values, given describe(); null if it does: a lazily
// negated or conjugated view, or a storage that was shrunk or freed. " is ...", after its name.
// Releases the GIL.
const char* find_lazy(PyObject* tensor, const TensorInfo& info);
const char* find_short_storage(PyObject* tensor, const TensorInfo& info);

// The DType of a torch.dtype, or -1.
int dtype_code(PyObject* torch_dtype);

// Whether every element of a dense block is touched once: true for any permutation of contiguous.
bool is_dense(const TensorInfo& info);

bool same_shape(const TensorInfo& a, const TensorInfo& b);

// Whether element k of a's memory and of b's are the same element of the tensor, given same_shape
// and that a is dense. The stride of a dimension of size one does not matter.
bool same_layout(const TensorInfo& a, const TensorInfo& b);

// Where describe() gets its facts: "DLPack" (one C call) or "Python" (attributes, slower).
const char* tensors_read_by();

}  // namespace radam
