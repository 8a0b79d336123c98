// The module _cpu: the plan of a step, and the CPU kernel. Links to nothing but Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "cpu/step_cpu.h"
#include "cpu/threads.h"
#include "host/gradients.h"
#include "host/plan.h"

namespace py = pybind11;

namespace radam {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Whether a row has what its formats need.
bool complete(const LowMemory& row, const DTypeSet& dtypes) {
  if (dtypes.state == kBlock8 && (!row.exp_avg_exponent || !row.exp_avg_sq_exponent)) return false;
  if (dtypes.param == kMaster24) return row.remainder;
  const bool aligned = row.remainder && reinterpret_cast<uintptr_t>(row.remainder) % 2 == 0;
  return dtypes.param != kMaster32 || aligned;
}

// The caller has validated the tensors; counts, pointers and alignment are cheap to check again.
void check(const Segments& segments, const DTypeSet& dtypes, const StepScalars* rows,
           int64_t scalars) {
  const bool missing =
      !segments.rows || !segments.grads || !rows || (is_low_memory(dtypes) && !segments.low_memory);
  if (segments.count < 0 || (segments.count > 0 && missing)) {
    throw py::value_error("expected tables with rows, got " + std::to_string(segments.count) +
                          " segments and " + std::to_string(scalars) +
                          " rows of scalars, or the address of a table is null");
  }
  for (int64_t i = 0; i < segments.count; ++i) {
    const Segment& s = segments.rows[i];
    const auto aligned = [&](const void* data, DType dtype) {
      return data && reinterpret_cast<uintptr_t>(data) % kDTypeSizes[dtype] == 0;
    };
    const bool good = s.numel >= 0 && s.scalars >= 0 && s.scalars < scalars &&
                      (s.numel == 0 ||
                       (aligned(s.param, dtypes.param) && aligned(segments.grads[i], dtypes.grad) &&
                        aligned(s.exp_avg, dtypes.state) && aligned(s.exp_avg_sq, dtypes.state) &&
                        (!is_low_memory(dtypes) || complete(segments.low_memory[i], dtypes))));
    if (!good) {
      throw py::value_error(
          "segment " + std::to_string(i) + " of " + std::to_string(segments.count) + ": numel " +
          std::to_string(s.numel) + ", scalars " + std::to_string(s.scalars) + " of " +
          std::to_string(scalars) + ", or a pointer that is null or not aligned to its element");
    }
  }
}

void step(uintptr_t rows, uintptr_t grads, int64_t count, int param, int grad, int state,
          uintptr_t scalars, int64_t scalars_count, int threads, int isa, uintptr_t low_memory) {
  const auto& sets = instruction_sets();
  if (isa < 0 || isa >= static_cast<int>(sets.size())) {
    throw py::value_error("isa: expected 0 to " + std::to_string(sets.size() - 1) + ", got " +
                          std::to_string(isa));
  }
  const DTypeSet dtypes = dtype_set(param, grad, state);
  const Segments segments = {pointer<const Segment>(rows), pointer<const void* const>(grads),
                             pointer<const LowMemory>(low_memory), count};
  check(segments, dtypes, pointer<const StepScalars>(scalars), scalars_count);
  py::gil_scoped_release released;
  step_cpu(segments, dtypes, pointer<const StepScalars>(scalars), threads,
           sets[static_cast<size_t>(isa)]);
}

py::object object(const Ref& ref) { return py::reinterpret_borrow<py::object>(ref.get()); }

py::list objects(const std::vector<Ref>& refs) {
  py::list rows;
  for (const Ref& ref : refs) rows.append(object(ref));
  return rows;
}

py::list tensors(const Bucket& bucket) {
  py::list rows;
  for (const Tensors& t : bucket.tensors) {
    rows.append(py::make_tuple(object(t[kParam]), object(t[kGrad]), object(t[kExpAvg]),
                               object(t[kExpAvgSq])));
  }
  return rows;
}

py::list low_memory(const Bucket& bucket) {
  const auto tensor = [](const Ref& ref) { return ref.get() ? object(ref) : py::none(); };
  py::list rows;
  for (size_t i = 0; i < bucket.low_memory.size(); ++i) {
    const auto& [remainder, exp_avg_exponent, exp_avg_sq_exponent] = bucket.low_memory_tensors[i];
    const LowMemory& row = bucket.low_memory[i];
    rows.append(py::make_tuple(tensor(remainder), tensor(exp_avg_exponent),
                               tensor(exp_avg_sq_exponent), row.first_index, row.key));
  }
  return rows;
}

py::list steps(const Bucket& bucket) {
  py::list rows;
  for (size_t i = 0; bucket.capturable && i < bucket.tensors.size(); ++i) {
    rows.append(py::make_tuple(object(bucket.tensors[i][kStep]), bucket.counters[i].group));
  }
  return rows;
}

py::list counts(const Bucket& bucket) {
  py::list rows;
  for (const Count& count : bucket.counts) rows.append(py::make_tuple(count.group, count.step));
  return rows;
}

template <typename Row>
py::bytes as_bytes(const std::vector<Row>& rows) {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

// Raises `message` and `arguments` as the exception class `name` of this module.
template <typename... Arguments>
void raise(const char* name, const Arguments&... arguments) {
  PyErr_SetObject(py::module_::import("radam_kernels._cpu").attr(name).ptr(),
                  py::make_tuple(arguments...).ptr());
}

#define RADAM_NAME(name) #name,
const std::vector<std::string> kScalarsFields = {RADAM_STEP_SCALARS(RADAM_NAME)};
const std::vector<std::string> kSegmentFields = {RADAM_SEGMENT(RADAM_NAME)};
const std::vector<std::string> kLowMemoryFields = {RADAM_LOW_MEMORY(RADAM_NAME)};
#undef RADAM_NAME

}  // namespace
}  // namespace radam

PYBIND11_MODULE(_cpu, m) {
  using namespace radam;
  m.doc() = "The plan of a step, and the CPU kernel of radam_kernels.";
  m.attr("fingerprint") = RADAM_FINGERPRINT;
  m.attr("cuda_built") = RADAM_CUDA_BUILT;  // "yes", "off" or "no nvcc"
  m.attr("dtypes") = std::vector<std::string>(kDTypeNames, kDTypeNames + kDTypes);
  m.attr("formats") = std::vector<std::string>(kDTypeNames + kDTypes, kDTypeNames + kFormats);
  m.attr("step_scalars_fields") = kScalarsFields;
  m.attr("segment_fields") = kSegmentFields;
  m.attr("low_memory_fields") = kLowMemoryFields;
  std::vector<std::string> isas;
  for (const InstructionSet& isa : instruction_sets()) isas.push_back(isa.name);
  m.attr("instruction_sets") = isas;
  m.def("threads_from", &threads_from, "Where threads come from: OpenMP or std::thread.");
  m.def("tensors_read_by", &tensors_read_by, "How tensors are read: DLPack or Python.");
  m.def("dtype_code", [](py::handle dtype) { return dtype_code(dtype.ptr()); });
  m.def("format_code", [](py::handle format) { return format_code(format.ptr()); });
  m.def("is_dense", [](py::handle tensor) {
    TensorInfo info;
    return describe(tensor.ptr(), info) && is_dense(info);
  });
  m.def("supported", [](int param, int grad, int state) {
    return param >= 0 && grad >= 0 && state >= 0 &&
           supported(
               {static_cast<DType>(param), static_cast<DType>(grad), static_cast<DType>(state)});
  });
  m.def(
      "formats_of",
      [](int param, bool complex, int state_dtype, int master_weights, bool stochastic_rounding) {
        const FormatOptions options = {state_dtype, master_weights, stochastic_rounding};
        const DType dtype = static_cast<DType>(param);
        return py::make_tuple(static_cast<int>(param_format(dtype, complex, options)),
                              static_cast<int>(state_format(dtype, complex, options)));
      },
      py::arg("param"), py::arg("complex"), py::arg("state_dtype"), py::arg("master_weights"),
      py::arg("stochastic_rounding"),
      "The codes of a parameter's format and of its moments' under the options of a group.");
  m.def("step", &step, py::arg("segments"), py::arg("grads"), py::arg("count"), py::arg("param"),
        py::arg("grad"), py::arg("state"), py::arg("scalars"), py::arg("scalars_count"),
        py::arg("threads"), py::arg("isa") = 0, py::arg("low_memory") = 0,
        "Steps `count` segments at address `segments` (int64 rows of segment_fields), whose "
        "gradients' addresses are at `grads`, with the StepScalars at address `scalars`. Dtypes "
        "are codes; `isa` indexes instruction_sets; `low_memory` is the address of rows of "
        "low_memory_fields.");

  py::exception<Refusal>(m, "Refusal", PyExc_ValueError).attr("__doc__") =
      "Tensors that can't be stepped together: a message with {0} and {1} for "
      "the names of owners, and the owners' indices in Plan.owners.";
  py::exception<InvalidGroup>(m, "InvalidGroup", PyExc_ValueError).attr("__doc__") =
      "Invalid options of a parameter group: the group's index, and the step.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const PythonError&) {  // Python's error indicator is set already
    } catch (const Refusal& refusal) {
      raise("Refusal", refusal.message, refusal.owners);
    } catch (const InvalidGroup& invalid) {
      raise("InvalidGroup", invalid.group, invalid.step);
    }
  });

  py::class_<Bucket>(m, "Bucket", "The segments of one launch; valid until Plan.release().")
      .def_property_readonly(
          "device", [](const Bucket& b) { return py::make_tuple(b.device.type, b.device.index); },
          "DLPack's number of the device type, and the device's index.")
      .def_property_readonly(
          "dtypes",
          [](const Bucket& b) {
            return py::make_tuple(static_cast<int>(b.dtypes.param), static_cast<int>(b.dtypes.grad),
                                  static_cast<int>(b.dtypes.state));
          },
          "Codes of the dtypes of parameters, gradients and moments.")
      .def_readonly("capturable", &Bucket::capturable,
                    "Whether the step counts are stored and advanced on the bucket's device.")
      .def_property_readonly("count", [](const Bucket& b) { return b.segments.size(); })
      .def_property_readonly(
          "segment_rows", [](const Bucket& b) { return as_bytes(b.segments); },
          "Rows of segment_fields, as bytes.")
      .def_property_readonly(
          "grad_rows", [](const Bucket& b) { return as_bytes(b.grads); },
          "The address of each segment's gradient, as bytes.")
      .def_property_readonly(
          "low_memory_rows", [](const Bucket& b) { return as_bytes(b.low_memory); },
          "Rows of low_memory_fields, as bytes; empty for plain dtypes.")
      .def_property_readonly(
          "low_memory", &low_memory,
          "Tensors and numbers of low_memory_fields for each segment; a tensor can be None.")
      .def_property_readonly(
          "scalar_rows", [](const Bucket& b) { return as_bytes(b.scalars); },
          "The rows of StepScalars that the segments use, as bytes; empty if capturable.")
      .def_property_readonly(
          "scalars",
          [](const Bucket& b) {
            return py::make_tuple(reinterpret_cast<uintptr_t>(b.scalars.data()), b.scalars.size());
          },
          "Address and number of these rows.")
      .def_property_readonly(
          "scalar_indices",
          [](const Bucket& b) {
            py::list rows;
            for (const Segment& segment : b.segments) rows.append(segment.scalars);
            return rows;
          },
          "The index of each segment's row of StepScalars.")
      .def_property_readonly("counts", &counts, "(group index, step count) of each of these rows.")
      .def_property_readonly(
          "counter_rows", [](const Bucket& b) { return as_bytes(b.counters); },
          "Addresses, dtypes and groups of the step counts, as bytes.")
      .def_property_readonly(
          "hyperparameter_rows", [](const Bucket& b) { return as_bytes(b.hyperparameters); },
          "The options of the counters' groups, as bytes; capturable only.")
      .def_property_readonly("steps", &steps,
                             "(step tensor, group index) of each segment; capturable only.")
      .def_property_readonly("tensors", &tensors,
                             "(param, grad, exp_avg, exp_avg_sq) of each segment.")
      .def_property_readonly("groups", [](const Bucket& b) { return object(b.groups); })
      .def_property_readonly("scaling", [](const Bucket& b) { return object(b.scaling); })
      .def_property(
          "cache", [](const Bucket& b) { return b.cache.get() ? object(b.cache) : py::none(); },
          [](Bucket& b, const py::object& cache) { b.cache = Ref::borrow(cache.ptr()); },
          "The backend's cache, kept between steps as long as the plan lives; None at first.")
      .def("run", &Plan::run_bucket, py::arg("threads"), "Steps the segments, on the CPU.");

  py::class_<GradientBucket>(m, "GradientBucket",
                             "The gradients of one device, dtype and placement; valid until "
                             "Gradients.release().")
      .def_property_readonly(
          "device",
          [](const GradientBucket& b) { return py::make_tuple(b.device.type, b.device.index); },
          "DLPack's number of the device type, and the device's index.")
      .def_property_readonly(
          "dtype", [](const GradientBucket& b) { return static_cast<int>(b.dtype); },
          "The code of their dtype; of each part, if complex.")
      .def_readonly("complex", &GradientBucket::complex)
      .def_property_readonly("count", [](const GradientBucket& b) { return b.rows.size(); })
      .def_property_readonly(
          "rows", [](const GradientBucket& b) { return as_bytes(b.rows); },
          "The address and the number of elements of each gradient, as bytes of int64.")
      .def_property_readonly(
          "owners", [](const GradientBucket& b) { return objects(b.owners); }, "The parameters.")
      .def_property_readonly(
          "grads", [](const GradientBucket& b) { return objects(b.grads); },
          "The gradients, as their parameters have them.")
      .def_property_readonly(
          "tensors", [](const GradientBucket& b) { return objects(b.tensors); },
          "The dense, local tensors that the rows describe.")
      .def_property(
          "cache",
          [](const GradientBucket& b) { return b.cache.get() ? object(b.cache) : py::none(); },
          [](GradientBucket& b, const py::object& cache) { b.cache = Ref::borrow(cache.ptr()); },
          "The backend's cache, kept as long as the Gradients live; None at first.")
      .def("power_sum", &GradientBucket::power_sum, py::arg("norm_type"), py::arg("threads"),
           py::arg("isa") = 0,
           "The sum of |g|**norm_type on the CPU, or the largest |g|; norm_type is 1, 2 or inf.");

  py::class_<Gradients>(m, "Gradients", "The gradients of an optimizer; see csrc/host/gradients.h.")
      .def(py::init<>())
      .def(
          "refresh",
          [](Gradients& gradients, py::handle groups, const py::dict& replaced) {
            return py::reinterpret_steal<py::list>(
                gradients.refresh(groups.ptr(), replaced.ptr()).release());
          },
          py::arg("groups"), py::arg("replaced"))
      .def(
          "compare",
          [](const Gradients& gradients, py::handle groups) {
            const Gradients::Comparison found = gradients.compare(groups.ptr());
            return py::make_tuple(found.same, found.replaced,
                                  found.changed.get() ? object(found.changed) : py::none());
          },
          py::arg("groups"),
          "How many gradients are those that refresh() read, how many are others, and a parameter "
          "whose gradient was changed in place, or None.")
      .def("release", &Gradients::release, "Drops all references to tensors.")
      .def_property_readonly("buckets", &Gradients::buckets,
                             py::return_value_policy::reference_internal);

  py::class_<Plan>(m, "Plan", "The plan of one step; see csrc/host/plan.h.")
      .def(py::init<>())
      .def(
          "refresh",
          [](Plan& plan, py::handle groups, py::handle state, const py::dict& repaired,
             py::handle scaling, uint32_t first_ordinal) {
            return py::reinterpret_steal<py::list>(plan.refresh(groups.ptr(), state.ptr(),
                                                                repaired.ptr(), scaling.ptr(),
                                                                first_ordinal)
                                                       .release());
          },
          py::arg("groups"), py::arg("state"), py::arg("repaired"), py::arg("scaling"),
          py::arg("first_ordinal") = 0)
      .def(
          "refresh_tensors",
          [](Plan& plan, const py::list& params, const py::list& grads, const py::list& exp_avgs,
             const py::list& exp_avg_sqs, double step, const py::dict& group, py::handle scaling) {
            return py::reinterpret_steal<py::list>(
                plan.refresh_tensors(params.ptr(), grads.ptr(), exp_avgs.ptr(), exp_avg_sqs.ptr(),
                                     step, group.ptr(), scaling.ptr())
                    .release());
          },
          py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
          py::arg("step"), py::arg("group"), py::arg("scaling"))
      .def(
          "step_parameter",
          [](Plan& plan, const py::dict& group, py::handle param, py::handle state,
             py::handle scaling, int threads, uint32_t ordinal) {
            return plan.step_parameter(group.ptr(), param.ptr(), state.ptr(), scaling.ptr(),
                                       threads, ordinal);
          },
          py::arg("group"), py::arg("param"), py::arg("state"), py::arg("scaling"),
          py::arg("threads"), py::arg("ordinal"),
          "Steps one parameter with its state, if it can be stepped as it is, on the CPU.")
      .def("begin", &Plan::begin, "Bumps the version of every tensor that is written.")
      .def("commit", &Plan::commit, "Writes the step counts that the host keeps.")
      .def("run_cpu", &Plan::run_cpu, py::arg("threads"),
           "begin(), every bucket and commit() in one call: no signal handler runs between them.")
      .def("release", &Plan::release, "Drops all references to tensors.")
      .def_property_readonly("begun", &Plan::begun, "Whether memory may have been written.")
      .def_property_readonly("on_cpu", &Plan::on_cpu,
                             "Whether the plan has buckets, and all of them are on the CPU.")
      .def_property_readonly("buckets", &Plan::buckets, py::return_value_policy::reference_internal)
      .def_property_readonly("groups", [](const Plan& plan) { return object(plan.groups()); })
      .def_property_readonly("owners", [](const Plan& plan) { return objects(plan.owners()); });
}
