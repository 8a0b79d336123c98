// The module _cuda: the CUDA kernel. It links to Python and, statically, to the CUDA runtime.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/norm_cuda.h"
#include "cuda/step_cuda.h"

namespace py = pybind11;

namespace radam {
namespace {

// An address on the device, of a table that has rows.
template <typename T>
T* table(uintptr_t address, int64_t rows) {
  if (rows < 0 || (rows > 0 && (!address || address % 8 != 0))) {
    throw py::value_error("a table of " + std::to_string(rows) + " rows at address " +
                          std::to_string(address) + ": expected one that is there and aligned");
  }
  return reinterpret_cast<T*>(address);
}

// Launches without the GIL: a launch waits while the device's queue is full.

void step(uintptr_t segments, uintptr_t grads, uintptr_t low_memory, uintptr_t work, int run,
          int64_t blocks, int param, int grad, int state, uintptr_t scalars, int64_t scalars_count,
          uintptr_t device_scalars, uintptr_t factor, int device, uintptr_t stream) {
  const DTypeSet dtypes = dtype_set(param, grad, state);
  const CudaStep step = {dtypes,
                         table<const Segment>(segments, blocks),
                         table<const uintptr_t>(grads, blocks),
                         table<const LowMemory>(low_memory, is_low_memory(dtypes) ? blocks : 0),
                         table<const Work>(work, blocks),
                         run,
                         blocks,
                         table<const StepScalars>(scalars, scalars_count),
                         scalars_count,
                         table<const StepScalars>(device_scalars, 0),
                         reinterpret_cast<const double*>(factor),
                         device,
                         reinterpret_cast<void*>(stream)};
  const py::gil_scoped_release released;
  step_cuda(step);
}

void advance_counters(uintptr_t counters, int64_t count, uintptr_t groups, uintptr_t scalars,
                      uintptr_t grad_scale, uintptr_t found_inf, int device, uintptr_t stream) {
  const CudaAdvance advance = {
      table<const Counter>(counters, count),
      count,
      table<const Hyperparameters>(groups, count),
      table<StepScalars>(scalars, count),
      {reinterpret_cast<const float*>(grad_scale), reinterpret_cast<const float*>(found_inf)},
      device,
      reinterpret_cast<void*>(stream)};
  const py::gil_scoped_release released;
  advance_cuda(advance);
}

void upload(uintptr_t to, const py::bytes& from, int device, uintptr_t stream) {
  const std::string_view bytes = from;
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size % 8 != 0) throw py::value_error("expected whole rows of eight bytes");
  void* const target = table<char>(to, size);
  const py::gil_scoped_release released;
  upload_cuda(target, bytes.data(), size, device, reinterpret_cast<void*>(stream));
}

void power_sum(uintptr_t grads, uintptr_t work, int run, int64_t blocks, int dtype,
               double norm_type, uintptr_t partials, uintptr_t sum, int device, uintptr_t stream) {
  const CudaPowerSum power_sum = {dtype_set(dtype, dtype, dtype).grad,
                                  norm_of_order(norm_type),
                                  table<const Gradient>(grads, blocks),
                                  table<const Work>(work, blocks),
                                  run,
                                  blocks,
                                  table<double>(partials, blocks),
                                  table<double>(sum, 1),
                                  device,
                                  reinterpret_cast<void*>(stream)};
  const py::gil_scoped_release released;
  power_sum_cuda(power_sum);
}

int version(cudaError_t (*ask)(int*)) {
  int found = 0;
  ask(&found);
  return found;
}

}  // namespace
}  // namespace radam

PYBIND11_MODULE(_cuda, m) {
  using namespace radam;
  m.doc() = "The CUDA kernel of radam_kernels.";
  m.attr("fingerprint") = RADAM_FINGERPRINT;
  m.attr("architectures") = RADAM_ARCHITECTURES;
  m.attr("inline_scalars") = kInlineScalars;
  m.def(
      "chunk",
      [](int param, int grad, int state) { return cuda_chunk(dtype_set(param, grad, state)); },
      "Elements that one block steps.");
  m.def("step", &step, py::arg("segments"), py::arg("grads"), py::arg("low_memory"),
        py::arg("work"), py::arg("run"), py::arg("blocks"), py::arg("param"), py::arg("grad"),
        py::arg("state"), py::arg("scalars"), py::arg("scalars_count"), py::arg("device_scalars"),
        py::arg("factor"), py::arg("device"), py::arg("stream"),
        "Launches one step: tables by their addresses on the device, scalars on the host "
        "(at most inline_scalars rows) or on the device, dtypes as codes; factor, a float64 on the "
        "device that multiplies the gradients, may be 0.");
  m.def("advance", &advance_counters, py::arg("counters"), py::arg("count"), py::arg("groups"),
        py::arg("scalars"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("device"),
        py::arg("stream"),
        "Moves step counts on and makes a row of StepScalars for each, all by their addresses on "
        "the device; grad_scale and found_inf may be 0.");
  m.def("upload", &upload, py::arg("to"), py::arg("rows"), py::arg("device"), py::arg("stream"),
        "Copies bytes to an address on the device, in stream order; a CUDA graph keeps them.");
  m.def(
      "norm_chunk", [](int dtype) { return cuda_norm_chunk(dtype_set(dtype, dtype, dtype).grad); },
      "Elements of a gradient that one block adds up.");
  m.def("power_sum", &power_sum, py::arg("grads"), py::arg("work"), py::arg("run"),
        py::arg("blocks"), py::arg("dtype"), py::arg("norm_type"), py::arg("partials"),
        py::arg("sum"), py::arg("device"), py::arg("stream"),
        "Launches the sum of |g|**norm_type, or if that is inf the largest |g|: tables, room for "
        "a float64 "
        "of each block, and the float64 result by their addresses on the device.");
  m.def("why_not", &why_not_cuda, "Why no kernel runs on this device; empty if they do.");
  m.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
  m.def("driver_version", [] { return version(cudaDriverGetVersion); });
}
