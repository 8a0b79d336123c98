// Validates the tensors of a parameter.
#include "host/dtensor.h"
#include "host/plan.h"

namespace radam {
namespace {

constexpr const char* kStreamNames[] = {"param",
                                        "grad",
                                        "exp_avg",
                                        "exp_avg_sq",
                                        "step",
                                        "param_remainder",
                                        "exp_avg_exponent",
                                        "exp_avg_sq_exponent"};

}  // namespace

// Adds row_ to its bucket, or returns why it can't be stepped.
Plan::Reason Plan::add_row(const Ref& owner, int64_t group, Entry& entry) {
  const Group& options = groups_[static_cast<size_t>(group)];
  if (is_dtensor(row_[kParam].get())) {
    if (const Reason reason = use_local_tensors()) return reason;
  }
  if (const Reason reason = check(options, entry)) return reason;
  if (!options.caller_counts) {
    if (const Reason reason = check_step(options, entry.seen[kStep])) return reason;
    if (is_low_memory(dtypes_)) locate_shard(owner.get(), *entry.low_memory);
  }
  append(owner, group, entry);
  return {};
}

// Sets which elements of the whole parameter `owner` has; asks Python where its spec is new.
void Plan::locate_shard(PyObject* owner, LowMemoryEntry& entry) {
  if (!is_dtensor(owner)) {
    entry.spec = Ref();
    entry.first_index = entry.shard = 0;
    return;
  }
  Ref spec = spec_of(owner);
  if (spec.get() == entry.spec.get()) return;
  static PyObject* const shard_of =
      attribute(Ref::steal(PyImport_ImportModule("radam_kernels.sharding")).get(), "shard_of")
          .release();
  const Ref found = Ref::steal(PyObject_CallOneArg(shard_of, owner));
  entry.first_index = static_cast<uint64_t>(to_int(PyTuple_GetItem(found.get(), 0)));
  entry.shard = static_cast<uint32_t>(to_int(PyTuple_GetItem(found.get(), 1)));
  entry.spec = std::move(spec);
}

// Replaces the DTensors in row_ by their local tensors, if all are placed in the same way.
Plan::Reason Plan::use_local_tensors() {
  Ref locals[kStreams];
  for (int i : {kParam, kGrad, kExpAvg, kExpAvgSq, kRemainder}) {
    PyObject* tensor = row_[i].get();
    if (!tensor) continue;
    if (!is_dtensor(tensor)) return {" is not a DTensor as param is", kStreamNames[i]};
    if (i > 0 && !same_placement(row_[kParam].get(), tensor)) {
      return {" is placed in another way than param", kStreamNames[i]};
    }
    locals[i] = local_tensor(tensor);
    if (!locals[i].get()) return {" has no plain local tensor", kStreamNames[i]};
  }
  for (int i = 0; i < kStreams; ++i) {
    if (locals[i].get()) row_[i] = std::move(locals[i]);
  }
  return {};
}

// Describes the tensors of row_ in infos_, sets their dtypes_, and returns why they can't be
// stepped together.
Plan::Reason Plan::check(const Group& group, Entry& entry) {
  for (int i = 0; i < kStep; ++i) {
    if (!describe(row_[i].get(), infos_[i])) {
      return {" has no memory that a kernel can use", kStreamNames[i]};
    }
  }
  const TensorInfo& param = infos_[kParam];
  if (param.dtype < 0) return {"param must be float32, bfloat16, float16, float64 or complex"};
  const FormatOptions& formats = group.formats;
  if (param.dtype == kFloat16 && !param.complex &&
      (formats.master_weights || formats.stochastic_rounding)) {
    return {"float16 parameters can't have master_weights or stochastic_rounding"};
  }
  const DType dtype = static_cast<DType>(param.dtype);
  dtypes_.param = group.caller_counts ? dtype : param_format(dtype, param.complex, formats);
  dtypes_.state = group.caller_counts ? static_cast<DType>(infos_[kExpAvg].dtype)
                                      : state_format(dtype, param.complex, formats);
  for (int i = 1; i < kStep; ++i) {
    const TensorInfo& other = infos_[i];
    const bool codes = i != kGrad && dtypes_.state == kBlock8;
    if (!(other.device == param.device)) return {"param, grad and moments are on several devices"};
    if (!same_shape(param, other)) return {"param, grad and moments differ in shape"};
    if (codes && other.integer != 8) return {"the moments are not in the format block8"};
    if (codes) continue;
    if (other.dtype < 0) return {"grad and moments must be float32, bfloat16, float16 or float64"};
    if (other.complex != param.complex) return {"of param, grad and moments some are complex"};
  }
  dtypes_.grad = static_cast<DType>(infos_[kGrad].dtype);
  if (infos_[kExpAvg].dtype != infos_[kExpAvgSq].dtype) {
    return {"exp_avg and exp_avg_sq differ in dtype"};
  }
  if (dtypes_.state != kBlock8 && infos_[kExpAvg].dtype != weight_dtype(dtypes_.state)) {
    return {"exp_avg and exp_avg_sq have another dtype than state_dtype"};
  }
  if (!supported(dtypes_)) {
    return {is_low_memory(dtypes_)
                ? "grad must be float32 or have the dtype of param, for such a format"
                : "float64 goes with float64 only, for param, grad and moments alike"};
  }
  if (!is_dense(param)) return {"param is not dense: it has gaps or elements that share memory"};
  for (int i = 1; i < kStep; ++i) {
    if (!same_layout(param, infos_[i])) return {"param, grad and moments differ in strides"};
  }
  for (int i = 0; i < kStep; ++i) {
    if (const Reason reason = check_memory(i, entry.seen[i])) return reason;
  }
  if (!is_low_memory(dtypes_) && !row_[kRemainder].get()) return {};
  return check_low_memory(entry);
}

// Checks what the format has in addition to the four tensors of a plain dtype.
Plan::Reason Plan::check_low_memory(Entry& entry) {
  if (row_[kRemainder].get() && !has_remainder(dtypes_.param)) {
    return {" is of no use without master_weights and a bfloat16 param", kStreamNames[kRemainder]};
  }
  if (dtypes_.state != kBlock8) {
    row_[kExpAvgExponent] = Ref();
    row_[kExpAvgSqExponent] = Ref();
  }
  if (!entry.low_memory) entry.low_memory = std::make_unique<LowMemoryEntry>();
  for (int i = kPlainStreams; i < kStreams; ++i) {
    const bool needed = i == kRemainder ? has_remainder(dtypes_.param) : dtypes_.state == kBlock8;
    if (!needed) continue;
    TensorInfo& info = infos_[i];
    if (!row_[i].get() || !describe(row_[i].get(), info)) {
      return {" is not there, or has no memory that a kernel can use", kStreamNames[i]};
    }
    const bool fits = i == kRemainder ? is_remainder(info) : is_exponents(info);
    if (!fits) return {" does not fit param and the format", kStreamNames[i]};
    Seen& seen = entry.low_memory->seen[i - kPlainStreams];
    if (const Reason reason = check_memory(i, seen)) return reason;
  }
  return {};
}

// Whether a tensor has a remainder for each element of the parameter, in its layout.
bool Plan::is_remainder(const TensorInfo& info) const {
  const TensorInfo& param = infos_[kParam];
  return info.integer == (dtypes_.param == kMaster24 ? -8 : -16) && info.device == param.device &&
         same_shape(info, param) && same_layout(info, param);
}

// Whether a tensor has an exponent for each block of the parameter.
bool Plan::is_exponents(const TensorInfo& info) const {
  const TensorInfo& param = infos_[kParam];
  return info.integer == 8 && info.device == param.device && info.ndim == 1 &&
         info.numel == (param.numel + kBlock - 1) / kBlock && is_dense(info);
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
