// Recognises a tensor that is as it was: cheaper than describing it anew, and no less safe.
#pragma once

#include <cstddef>

#include "tensor_info.h"

namespace radam {

// What a tensor said of itself, and the memory of the two C++ objects that it said it from.
//
// describe() is a function of a plain tensor's TensorImpl and of its StorageImpl. Where every byte
// of both, apart from their reference counts, is what it was, the answer is what it was, too; no
// matter which bytes mean what. Whatever is done to a tensor (.data =, set_, resize_, swap_tensors,
// share_memory_, a lazy clone) changes some of them, and then it is described anew. Nothing is held
// and nothing is trusted that is not compared: a tensor's objects are alive while it is looked at.
class Snapshot {
 public:
  // As describe(); remembers the answer if the tensor comes again.
  bool describe(PyObject* tensor, TensorInfo& info);

 private:
  static constexpr size_t kImpl = 208, kStorage = 112;  // bytes of objects that are remembered

  const char* impl_ = nullptr;  // of the remembered answer; null if there is none
  const char* seen_ = nullptr;  // of the last tensor: one that comes just once is not remembered
  const char* storage_;
  size_t impl_size_, storage_size_;
  char* data_;
  Device device_;
  int dtype_;
  int32_t ndim_;
  const int64_t *sizes_, *strides_;
  int64_t numel_;
  alignas(8) char impl_bytes_[kImpl], storage_bytes_[kStorage];
};

// Whether this torch's tensors are such that snapshots work; else describe() is asked every time.
bool snapshots_work();

}  // namespace radam
