// The buckets of a plan, and the step.
#include "host/plan.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/step_cpu.h"

namespace radam {
namespace {

double number(PyObject* scaling, PyObject* name, double otherwise) {
  const Ref value = attribute(scaling, name);
  return value.get() == Py_None ? otherwise : to_double(value.get());
}

}  // namespace

void Plan::append(const Ref& owner, int64_t group, const Entry& entry) {
  const Group& options = groups_[static_cast<size_t>(group)];
  Bucket& bucket = bucket_of(options.capturable);
  Counter counter = {nullptr, kFloat32, static_cast<int32_t>(group)};
  double next = count_;
  if (!options.caller_counts) {
    counter.step = infos_[kStep].data;
    counter.dtype = infos_[kStep].dtype;
    if (!options.capturable) next = next_count(counter.step, counter.dtype);
  }
  const int64_t scalars = options.capturable ? static_cast<int64_t>(bucket.segments.size())
                                             : scalars_index(bucket, group, next);
  bucket.segments.push_back({infos_[kParam].data, infos_[kExpAvg].data, infos_[kExpAvgSq].data,
                             infos_[kParam].reals(), scalars});
  bucket.grads.push_back(infos_[kGrad].data);
  if (is_low_memory(dtypes_)) {
    const auto data = [&](int stream) {
      return row_[stream].get() ? infos_[stream].data : nullptr;
    };
    bucket.low_memory.push_back({data(kRemainder), data(kExpAvgExponent), data(kExpAvgSqExponent),
                                 entry.low_memory->first_index,
                                 parameter_key(entry.ordinal, entry.low_memory->shard)});
    LowMemoryTensors& tensors = bucket.low_memory_tensors.emplace_back();
    std::move(row_.begin() + kPlainStreams, row_.end(), tensors.begin());
  }
  bucket.owners.push_back(static_cast<int64_t>(owners_.size()));
  Tensors& tensors = bucket.tensors.emplace_back();
  std::move(row_.begin(), row_.begin() + kPlainStreams, tensors.begin());
  bucket.counters.push_back(counter);
  owners_.push_back(Ref::borrow(owner.get()));
}

// Finds or makes the bucket for the tensors in infos_ and their dtypes_.
Bucket& Plan::bucket_of(bool capturable) {
  for (Bucket& bucket : buckets_) {
    if (bucket.device == infos_[kParam].device && bucket.dtypes == dtypes_ &&
        bucket.capturable == capturable) {
      return bucket;
    }
  }
  return buckets_.emplace_back(infos_[kParam].device, dtypes_, capturable);
}

int64_t Plan::scalars_index(Bucket& bucket, int64_t group, double step) const {
  // Nearly always the count of the previous parameter.
  for (size_t i = bucket.counts.size(); i-- > 0;) {
    if (bucket.counts[i].group == group && bucket.counts[i].step == step) {
      return static_cast<int64_t>(i);
    }
  }
  bucket.counts.push_back({group, step});
  return static_cast<int64_t>(bucket.counts.size()) - 1;
}

// Makes the scalars of each bucket, and refuses segments that share memory.
void Plan::complete(PyObject* groups, PyObject* scaling) {
  for (Bucket& bucket : buckets_) {
    if (bucket.segments.empty()) continue;
    bucket.groups = Ref::borrow(groups);
    bucket.scaling = Ref::borrow(scaling);
    if (bucket.capturable) {
      read_device_groups(bucket, scaling);
    } else {
      make_scalars(bucket);
    }
    if (bucket.device.type == kCPU) bucket.grad_factor = number(scaling, RADAM_STR(factor), 1.0);
  }
  if (const auto found = overlap_check_.find(buckets_)) {
    const auto owner = [&](int64_t i) { return owners_[static_cast<size_t>(i)].get(); };
    if (found->stream == found->other_stream && owner(found->owner) == owner(found->other)) {
      throw Refusal{"{0} is given twice; leave one out", {found->owner}};
    }
    throw Refusal{found->stream + " of {0} shares memory with " + found->other_stream +
                      " of {1}; a step writes to it: clone one of them, or leave one out",
                  {found->owner, found->other}};
  }
}

void Plan::make_scalars(Bucket& bucket) {
  for (const Count& count : bucket.counts) {
    Group& group = groups_[static_cast<size_t>(count.group)];
    if (!group.has_host) {
      if (!read_hyperparameters(group.options.get(), group.host)) {
        throw InvalidGroup{count.group, count.step};
      }
      group.has_host = true;
    }
    if (!valid(group.host, count.step)) throw InvalidGroup{count.group, count.step};
    bucket.scalars.push_back(step_scalars(group.host, count.step));
  }
}

void Plan::read_device_groups(Bucket& bucket, PyObject* scaling) {
  bucket.hyperparameters.assign(groups_.size(), {});
  int64_t last = -1;  // the parameters of a group are consecutive
  for (const Counter& counter : bucket.counters) {
    if (counter.group == last) continue;
    last = counter.group;
    PyObject* options = groups_[static_cast<size_t>(last)].options.get();
    Hyperparameters& row = bucket.hyperparameters[static_cast<size_t>(last)];
    Ref lr;
    if (!read_hyperparameters(options, row, &bucket.device, &lr) || !valid(row, 1.0)) {
      throw InvalidGroup{last, 1.0};
    }
    if (lr.get()) bucket.learning_rates.push_back(std::move(lr));
  }
  if (bucket.device.type == kCPU) {
    bucket.grad_scale = static_cast<float>(number(scaling, RADAM_STR(grad_scale), 1.0));
    bucket.found_inf = static_cast<float>(number(scaling, RADAM_STR(found_inf), 0.0));
  }
}

bool Plan::on_cpu() const {
  bool any = false;
  for (const Bucket& bucket : buckets_) {
    if (bucket.segments.empty()) continue;
    if (bucket.device.type != kCPU) return false;
    any = true;
  }
  return any;
}

std::vector<Bucket*> Plan::buckets() {
  std::vector<Bucket*> filled;
  for (Bucket& bucket : buckets_) {
    if (!bucket.segments.empty()) filled.push_back(&bucket);
  }
  return filled;
}

Ref Plan::groups() const {
  Ref all = Ref::steal(PyList_New(static_cast<Py_ssize_t>(groups_.size())));
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* options = Ref::borrow(groups_[i].options.get()).release();
    PyList_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), options);
  }
  return all;
}

void Plan::begin() {
  static PyObject* const increment_version = [] {
    const Ref graph = Ref::steal(PyImport_ImportModule("torch.autograd.graph"));
    return attribute(graph.get(), "increment_version").release();
  }();
  const size_t count = owners_.size() + written_.size();
  const Ref all = Ref::steal(PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i) {
    const Ref& one = i < owners_.size() ? owners_[i] : written_[i - owners_.size()];
    PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), Ref::borrow(one.get()).release());
  }
  // Raises for tensors that must not be written, such as those made in inference mode.
  if (count > 0) Ref::steal(PyObject_CallOneArg(increment_version, all.get()));
  begun_ = true;
}

void Plan::run_bucket(Bucket& bucket, int threads) {
  if (bucket.device.type != kCPU) throw std::invalid_argument("the bucket is not on the CPU");
  const GilReleased released;
  if (bucket.capturable) {
    const Scaling scaling = {&bucket.grad_scale, &bucket.found_inf};
    bucket.scalars.clear();
    for (const Counter& counter : bucket.counters) {
      bucket.scalars.push_back(advance(counter, bucket.hyperparameters.data(), scaling));
    }
  }
  for (StepScalars& row : bucket.scalars) row.grad_scale *= bucket.grad_factor;
  step_cpu(bucket.table(), bucket.dtypes, bucket.scalars.data(), threads, instruction_sets()[0]);
}

void Plan::commit() {
  for (const Bucket& bucket : buckets_) {
    if (bucket.capturable) continue;
    for (size_t i = 0; i < bucket.counters.size(); ++i) {
      const Counter& counter = bucket.counters[i];
      const double step = bucket.counts[static_cast<size_t>(bucket.segments[i].scalars)].step;
      if (counter.step) write_count(counter.step, counter.dtype, step);
    }
  }
}

void Plan::run_cpu(int threads) {
  for (const Bucket* bucket : buckets()) {
    if (bucket->device.type != kCPU) throw std::invalid_argument("a bucket is not on the CPU");
  }
  begin();
  for (Bucket* bucket : buckets()) run_bucket(*bucket, threads);
  commit();
}

void Plan::release() {
  for (Bucket& bucket : buckets_) bucket.release();
  items_.clear();
  item_of_.clear();
  groups_.clear();
  owners_.clear();
  written_.clear();
  row_ = {};
  begun_ = false;
}

}  // namespace radam
