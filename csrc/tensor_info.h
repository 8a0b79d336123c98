// What a kernel must know of a torch tensor, read without linking to torch.
#pragma once

#include <cstdint>

#include "python.h"
#include "step.h"

namespace radam {

// Device types, with DLPack's numbers.
constexpr int32_t kCPU = 1;
constexpr int32_t kCUDA = 2;
constexpr int32_t kROCm = 10;

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

constexpr int kMaxDims = 64;  // tensors of more are not described

struct TensorInfo {
  char* data = nullptr;
  Device device{};
  int dtype = -1;  // a DType, or -1 for any other: complex, integer, ...
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t numel = 0;
  int64_t storage[2 * kMaxDims];  // of sizes and strides, where nobody else holds them

  TensorInfo() = default;
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;

  char* end() const { return data + numel * kDTypeSizes[dtype]; }
};

// Fills `info` from a tensor whose memory can be read and written as it stands. False, with no
// Python error set, for any other: sparse, meta, a subclass without memory of its own, no tensor.
bool describe(PyObject* tensor, TensorInfo& info);

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
