// The module _cpu: the CPU kernel and the table of segments. It links to Python and to nothing
// else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "step_cpu.h"
#include "table.h"
#include "threads.h"

namespace py = pybind11;

namespace radam {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Python has checked the tensors; counts, pointers and alignment are cheap to check once more.
void check(const Segment* segments, int64_t count, const DTypeSet& dtypes, const StepScalars* rows,
           int64_t scalars) {
  if (count < 0 || (count > 0 && (!segments || !rows))) {
    throw py::value_error("expected tables with rows, got " + std::to_string(count) +
                          " segments and " + std::to_string(scalars) +
                          " rows of scalars, or the address of a table is null");
  }
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const auto aligned = [&](const void* data, DType dtype) {
      return data && reinterpret_cast<uintptr_t>(data) % kDTypeSizes[dtype] == 0;
    };
    const bool good =
        s.numel >= 0 && s.scalars >= 0 && s.scalars < scalars &&
        (s.numel == 0 || (aligned(s.param, dtypes.param) && aligned(s.grad, dtypes.grad) &&
                          aligned(s.exp_avg, dtypes.state) && aligned(s.exp_avg_sq, dtypes.state)));
    if (!good) {
      throw py::value_error("segment " + std::to_string(i) + " of " + std::to_string(count) +
                            ": numel " + std::to_string(s.numel) + ", scalars " +
                            std::to_string(s.scalars) + " of " + std::to_string(scalars) +
                            ", or a pointer that is null or not aligned to its element");
    }
  }
}

void step(uintptr_t segments, int64_t count, int param, int grad, int state, uintptr_t scalars,
          int64_t scalars_count, int threads, int isa) {
  const auto& sets = instruction_sets();
  if (isa < 0 || isa >= static_cast<int>(sets.size())) {
    throw py::value_error("isa: expected 0 to " + std::to_string(sets.size() - 1) + ", got " +
                          std::to_string(isa));
  }
  const DTypeSet dtypes = dtype_set(param, grad, state);
  check(pointer<const Segment>(segments), count, dtypes, pointer<const StepScalars>(scalars),
        scalars_count);
  py::gil_scoped_release released;
  step_cpu(pointer<const Segment>(segments), count, dtypes, pointer<const StepScalars>(scalars),
           threads, sets[static_cast<size_t>(isa)]);
}

py::list tensors(const Bucket& bucket) {
  py::list rows;
  for (const Tensors& t : bucket.tensors) {
    rows.append(py::make_tuple(py::handle(t.param.get()), py::handle(t.grad.get()),
                               py::handle(t.exp_avg.get()), py::handle(t.exp_avg_sq.get())));
  }
  return rows;
}

// Raised as ValueError(owner, stream, other owner, other stream): Python knows their names.
struct OverlapError {};

std::vector<Bucket*> prepare(Table& table, const py::list& groups) {
  table.scalars(groups.ptr());
  table.read_device_groups(groups.ptr());
  if (const auto found = table.find_overlap()) {
    const auto what =
        py::make_tuple(found->owner, found->stream, found->other, found->other_stream);
    PyErr_SetObject(py::module_::import("radam_kernels._cpu").attr("Overlap").ptr(), what.ptr());
    throw py::error_already_set();
  }
  return table.buckets();
}

// Python has checked the tensors of a bucket, and nothing has changed them since.
void step_bucket(const Bucket& bucket, Table& table, const py::list& groups, int threads) {
  if (bucket.device.type != kCPU) throw py::value_error("the bucket's tensors are not on the CPU");
  if (bucket.capturable && bucket.scalars.size() != bucket.counters.size()) {
    throw py::value_error("advance() the bucket first");
  }
  const StepScalars* scalars =
      bucket.capturable ? bucket.scalars.data() : table.scalars(groups.ptr()).data();
  py::gil_scoped_release released;
  step_cpu(bucket.segments.data(), static_cast<int64_t>(bucket.segments.size()), bucket.dtypes,
           scalars, threads, instruction_sets()[0]);
}

// Moves the counts of a capturable bucket on, where they are in the host's memory.
void advance_bucket(Bucket& bucket, float grad_scale, float found_inf) {
  if (bucket.device.type != kCPU) throw py::value_error("the bucket's counts are not on the CPU");
  const Scaling scaling = {&grad_scale, &found_inf};
  bucket.scalars.clear();
  for (const Counter& counter : bucket.counters) {
    bucket.scalars.push_back(advance(counter, bucket.hyperparameters.data(), scaling));
  }
}

py::list steps(const Bucket& bucket) {
  py::list rows;
  for (size_t i = 0; i < bucket.counters.size(); ++i) {
    rows.append(py::make_tuple(py::handle(bucket.steps[i].get()), bucket.counters[i].group));
  }
  return rows;
}

template <typename Row>
py::bytes as_bytes(const std::vector<Row>& rows) {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

py::list counts(const Table& table) {
  py::list result;
  for (const Count& count : table.counts()) result.append(py::make_tuple(count.group, count.step));
  return result;
}

#define RADAM_NAME(name) #name,
const std::vector<std::string> kScalarsFields = {RADAM_STEP_SCALARS(RADAM_NAME)};
const std::vector<std::string> kSegmentFields = {RADAM_SEGMENT(RADAM_NAME)};
#undef RADAM_NAME

}  // namespace
}  // namespace radam

PYBIND11_MODULE(_cpu, m) {
  using namespace radam;
  m.doc() = "The CPU kernel of radam_kernels and its table of segments.";
  m.attr("fingerprint") = RADAM_FINGERPRINT;
  m.attr("dtypes") = std::vector<std::string>(kDTypeNames, kDTypeNames + kDTypes);
  m.attr("step_scalars_fields") = kScalarsFields;
  m.attr("segment_fields") = kSegmentFields;
  std::vector<std::string> isas;
  for (const InstructionSet& isa : instruction_sets()) isas.push_back(isa.name);
  m.attr("instruction_sets") = isas;
  m.def("threads_from", &threads_from, "Where threads come from: OpenMP or std::thread.");
  m.def("tensors_read_by", &tensors_read_by, "How tensors are read: DLPack or Python.");
  m.def("snapshots_work", &snapshots_work,
        "Whether tensors that are as they were at the last step are recognised, not read anew.");
  m.def("dtype_code", [](py::handle dtype) { return dtype_code(dtype.ptr()); });
  m.def("is_dense", [](py::handle tensor) {
    TensorInfo info;
    return describe(tensor.ptr(), info) && is_dense(info);
  });
  m.def("supported", [](int param, int grad, int state) {
    return param >= 0 && grad >= 0 && state >= 0 &&
           supported(
               {static_cast<DType>(param), static_cast<DType>(grad), static_cast<DType>(state)});
  });
  m.def("state_dtype", [](int param, int requested) {
    return static_cast<int>(state_dtype(static_cast<DType>(param), requested));
  });
  m.def("step", &step, py::arg("segments"), py::arg("count"), py::arg("param"), py::arg("grad"),
        py::arg("state"), py::arg("scalars"), py::arg("scalars_count"), py::arg("threads"),
        py::arg("isa") = 0,
        "Steps `count` segments at address `segments` (48-byte rows) with the StepScalars at "
        "address `scalars`. Dtypes are codes; `isa` indexes instruction_sets.");

  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const PythonError&) {  // Python's error indicator is set already
    }
  });

  py::exception<OverlapError>(m, "Overlap", PyExc_ValueError);

  py::class_<Bucket>(m, "Bucket")
      .def_property_readonly(
          "device_type", [](const Bucket& b) { return b.device.type; }, "DLPack's number.")
      .def_property_readonly(
          "device", [](const Bucket& b) { return py::make_tuple(b.device.type, b.device.index); })
      .def_property_readonly(
          "dtypes",
          [](const Bucket& b) {
            return py::make_tuple(static_cast<int>(b.dtypes.param), static_cast<int>(b.dtypes.grad),
                                  static_cast<int>(b.dtypes.state));
          },
          "Codes of the dtypes of parameters, gradients and moments.")
      .def_property_readonly("count", [](const Bucket& b) { return b.segments.size(); })
      .def(
          "scalars",
          [](const Bucket& b) {
            py::list rows;
            for (const Segment& segment : b.segments) rows.append(segment.scalars);
            return rows;
          },
          "The row of StepScalars that each segment obeys.")
      .def_readonly("capturable", &Bucket::capturable,
                    "Whether the step counts lie on the bucket's device, and advance there.")
      .def_property_readonly(
          "segment_rows", [](const Bucket& b) { return as_bytes(b.segments); },
          "The segments as bytes, 48 a row.")
      .def_property_readonly(
          "counter_rows", [](const Bucket& b) { return as_bytes(b.counters); },
          "Where the step counts are, as bytes, 16 a row; capturable only.")
      .def_property_readonly(
          "hyperparameter_rows", [](const Bucket& b) { return as_bytes(b.hyperparameters); },
          "What the counters' groups say, as bytes, 72 a row; capturable only.")
      .def_property_readonly(
          "scalar_rows", [](const Bucket& b) { return as_bytes(b.scalars); },
          "The StepScalars that advance() made, as bytes, 72 a row.")
      .def("steps", &steps, "(step tensor, group index) of each segment; capturable only.")
      .def("advance", &advance_bucket, py::arg("grad_scale"), py::arg("found_inf"),
           "Moves the step counts on, on the CPU; capturable only.")
      .def("step", &step_bucket, "Steps the bucket's segments on so many threads at most.")
      .def("tensors", &tensors, "(param, grad, exp_avg, exp_avg_sq) of each segment.");

  py::class_<Table>(m, "Table", py::dynamic_attr())
      .def(py::init<>())
      .def("collect",
           [](Table& table, const py::list& groups, const py::dict& state) {
             return py::reinterpret_steal<py::list>(
                 table.collect(groups.ptr(), state.ptr()).release());
           })
      .def(
          "add",
          [](Table& table, py::handle param, py::handle grad, py::handle exp_avg,
             py::handle exp_avg_sq, py::handle step, int64_t group, py::handle owner,
             bool capturable) {
            table.add(param.ptr(), grad.ptr(), exp_avg.ptr(), exp_avg_sq.ptr(), step.ptr(), group,
                      owner.ptr(), capturable);
          },
          py::arg("param"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
          py::arg("step"), py::arg("group"), py::arg("owner"), py::arg("capturable") = false)
      .def("prepare", &prepare, py::return_value_policy::reference_internal,
           "The buckets, once StepScalars are made of the groups' options and no segment is found "
           "to use memory that another one writes. Raises ValueError or Overlap.")
      .def(
          "advance",
          [](Table& table) { return py::reinterpret_steal<py::list>(table.advance().release()); },
          "Writes the new step counts and lets go of every tensor; returns the owners.")
      .def(
          "scalars",
          [](Table& table, const py::list& groups) {
            const std::vector<StepScalars>& rows = table.scalars(groups.ptr());
            return py::make_tuple(reinterpret_cast<uintptr_t>(rows.data()), rows.size());
          },
          "Address and number of the rows of StepScalars that the segments obey.")
      .def(
          "scalar_rows",
          [](Table& table, const py::list& groups) {
            return as_bytes(table.scalars(groups.ptr()));
          },
          "These rows as bytes, 72 each.")
      .def("release", &Table::release)
      .def("buckets", &Table::buckets, py::return_value_policy::reference_internal)
      .def_property_readonly("counts", &counts)
      .def_property_readonly("owners", [](const Table& table) {
        return py::reinterpret_borrow<py::list>(table.owners());
      });
}
