// The module _cuda: the CUDA kernel. It links to Python and, statically, to the CUDA runtime.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "step_cuda.h"

namespace py = pybind11;

namespace radam {
namespace {

void step(uintptr_t segments, uintptr_t work, int64_t blocks, int param, int grad, int state,
          uintptr_t scalars, int64_t scalars_count, uintptr_t device_scalars, int device,
          uintptr_t stream) {
  if (blocks > 0 && (segments % 16 != 0 || work % 8 != 0 || !segments || !work)) {
    throw py::value_error("the tables are null or not aligned");
  }
  step_cuda({dtype_set(param, grad, state), reinterpret_cast<const Segment*>(segments),
             reinterpret_cast<const Work*>(work), blocks,
             reinterpret_cast<const StepScalars*>(scalars), scalars_count,
             reinterpret_cast<const StepScalars*>(device_scalars), device,
             reinterpret_cast<void*>(stream)});
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
  m.def("step", &step, py::arg("segments"), py::arg("work"), py::arg("blocks"), py::arg("param"),
        py::arg("grad"), py::arg("state"), py::arg("scalars"), py::arg("scalars_count"),
        py::arg("device_scalars"), py::arg("device"), py::arg("stream"),
        "Launches one step: tables by their addresses on the device, scalars on the host "
        "(at most inline_scalars rows) or on the device, dtypes as codes.");
  m.def("why_not", &why_not_cuda, "Why no kernel runs on this device; empty if they do.");
  m.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
  m.def("driver_version", [] { return version(cudaDriverGetVersion); });
}
