// Validates the tensors of a parameter.
#include "host/dtensor.h"
#include "host/plan.h"

namespace radam {
namespace {

constexpr const char* kStreamNames[] = {"param", "grad", "exp_avg", "exp_avg_sq", "step"};

}  // namespace

// Adds row_ to its bucket, or returns why it can't be stepped.
Plan::Reason Plan::add_row(const Ref& owner, int64_t group, Entry& entry) {
  const Group& options = groups_[static_cast<size_t>(group)];
  if (is_dtensor(row_[kParam].get())) {
    if (const Reason reason = use_local_tensors()) return reason;
  }
  if (const Reason reason = check(entry)) return reason;
  if (!options.caller_counts) {
    const DType param = static_cast<DType>(infos_[kParam].dtype);
    // There is no complex bfloat16.
    const bool none = infos_[kParam].complex && options.state_dtype == kBFloat16;
    if (infos_[kExpAvg].dtype != state_dtype(param, none ? -1 : options.state_dtype)) {
      return {"exp_avg and exp_avg_sq have another dtype than state_dtype"};
    }
    if (const Reason reason = check_step(options, entry.seen[kStep])) return reason;
  }
  append(owner, group);
  return {};
}

// Replaces the DTensors in row_ by their local tensors, if all are placed in the same way.
Plan::Reason Plan::use_local_tensors() {
  Ref locals[kStep];
  for (int i = 0; i < kStep; ++i) {
    PyObject* tensor = row_[i].get();
    if (!is_dtensor(tensor)) return {" is not a DTensor as param is", kStreamNames[i]};
    if (i > 0 && !same_placement(row_[kParam].get(), tensor)) {
      return {" is placed in another way than param", kStreamNames[i]};
    }
    locals[i] = local_tensor(tensor);
    if (!locals[i].get()) return {" has no plain local tensor", kStreamNames[i]};
  }
  for (int i = 0; i < kStep; ++i) row_[i] = std::move(locals[i]);
  return {};
}

// Describes the four tensors of row_ in infos_, and returns why they can't be stepped together.
Plan::Reason Plan::check(Entry& entry) {
  for (int i = 0; i < kStep; ++i) {
    if (!describe(row_[i].get(), infos_[i])) {
      return {" has no memory that a kernel can use", kStreamNames[i]};
    }
  }
  const TensorInfo& param = infos_[kParam];
  if (param.dtype < 0) return {"param must be float32, bfloat16, float16, float64 or complex"};
  for (int i = 1; i < kStep; ++i) {
    const TensorInfo& other = infos_[i];
    if (!(other.device == param.device)) return {"param, grad and moments are on several devices"};
    if (!same_shape(param, other)) return {"param, grad and moments differ in shape"};
    if (other.dtype < 0) return {"grad and moments must be float32, bfloat16, float16 or float64"};
    if (other.complex != param.complex) return {"of param, grad and moments some are complex"};
  }
  if (infos_[kExpAvg].dtype != infos_[kExpAvgSq].dtype) {
    return {"exp_avg and exp_avg_sq differ in dtype"};
  }
  if (!supported({static_cast<DType>(param.dtype), static_cast<DType>(infos_[kGrad].dtype),
                  static_cast<DType>(infos_[kExpAvg].dtype)})) {
    return {"float64 goes with float64 only, for param, grad and moments alike"};
  }
  if (!is_dense(param)) return {"param is not dense: it has gaps or elements that share memory"};
  for (int i = 1; i < kStep; ++i) {
    if (!same_layout(param, infos_[i])) return {"param, grad and moments differ in strides"};
  }
  for (int i = 0; i < kStep; ++i) {
    if (const Reason reason = check_memory(i, entry.seen[i])) return reason;
  }
  return {};
}

// Checks what describe() does not report. This takes longer than describe(), so the result is
// cached until the tensor's object or its address changes.
Plan::Reason Plan::check_memory(int stream, Seen& seen) const {
  PyObject* const tensor = row_[stream].get();
  const TensorInfo& info = infos_[stream];
  const bool same = seen.object == tensor && seen.impl == info.sizes && seen.data == info.data;
  // Gradients come from anywhere, and p.data = p.data.conj() changes neither object nor address.
  if (!same || stream == kGrad || info.complex) {
    if (const char* reason = find_lazy(tensor, info)) return {reason, kStreamNames[stream]};
  }
  if (same) return {};
  // Most gradients are new at each step, so this check must be cheap for them.
  if (stream != kGrad || reinterpret_cast<uintptr_t>(info.data) < kLowestAddress) {
    if (const char* reason = find_short_storage(tensor, info)) {
      return {reason, kStreamNames[stream]};
    }
  }
  seen = {tensor, info.sizes, info.data};
  return {};
}

Plan::Reason Plan::check_step(const Group& group, Seen& seen) {
  TensorInfo& info = infos_[kStep];
  const bool good = describe(row_[kStep].get(), info) && info.numel == 1 && !info.complex &&
                    (info.dtype == kFloat32 || info.dtype == kFloat64);
  if (group.capturable) {
    if (!good || !(info.device == infos_[kParam].device)) {
      return {
          "step must be one float32 or float64 in a tensor on the parameter's device, as "
          "capturable is true"};
    }
  } else if (!good || info.device.type != kCPU) {
    return {"step must be one float32 or float64 in a CPU tensor"};
  }
  return check_memory(kStep, seen);
}

}  // namespace radam
