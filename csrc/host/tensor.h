// Describes torch tensors without linking to torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "core/dtypes.h"
#include "host/python.h"

namespace radam {

// DLPack's number of the device type; radam_kernels/backends/devices.py has the others.
constexpr int32_t kCPU = 1;

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// Nearly all memory is allocated above this address. In a freed storage the address is the offset,
// far below it, so gradients below it are checked in full.
constexpr uintptr_t kLowestAddress = uintptr_t{1} << 40;

constexpr int kMaxDims = 64;  // tensors with more can't be described

struct TensorInfo {
  char* data = nullptr;
  Device device{};
  int dtype = -1;  // a DType (of each part, if complex), or -1 for any other
  bool complex = false;
  int integer = 0;  // bits of an integer of up to 16 bits, negative if it is signed
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t numel = 0;             // complex numbers count once
  std::vector<int64_t> storage;  // for sizes and strides, if describe() must copy them

  TensorInfo() = default;
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;

  int64_t reals() const { return complex ? 2 * numel : numel; }
  int64_t bytes() const { return reals() * (integer ? std::abs(integer) / 8 : kDTypeSizes[dtype]); }
};

// Fills `info` from a tensor whose memory can be read and written directly. False, without a Python
// exception, for anything else: sparse, meta, a subclass without memory of its own, not a tensor.
// Runs no Python code if torch has DLPack's C exchange API (2.10 and later).
bool describe(PyObject* tensor, TensorInfo& info);

// Why the memory of a tensor, which describe() accepts, does not hold its values: a lazily negated
// or conjugated view, or a storage that was shrunk or freed. The text follows the tensor's name;
// null if there is no reason. Both can release the GIL.
const char* find_lazy(PyObject* tensor, const TensorInfo& info);
const char* find_short_storage(PyObject* tensor, const TensorInfo& info);

// The DType of a torch.dtype or of its name, or -1.
int dtype_code(PyObject* dtype);

// Likewise, or kBlock8 for its name.
int format_code(PyObject* format);

// Whether the tensor fills one block of memory, without gaps or shared elements: contiguous, up to
// a permutation of dimensions.
bool is_dense(const TensorInfo& info);

bool same_shape(const TensorInfo& a, const TensorInfo& b);

// Whether two tensors of the same shape have the same strides, except in dimensions of size one,
// where the stride does not matter.
bool same_layout(const TensorInfo& a, const TensorInfo& b);

// How describe() reads tensors: "DLPack" (one C call) or "Python" (attributes, slower).
const char* tensors_read_by();

}  // namespace radam
