// Runs the CPU kernels for test_aarch64.py, without Python. Reads requests from stdin until its
// end: the tables of a step and the memory that they point into, or a gradient. Answers on stdout
// with the memory after the step, or with the norm.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "cpu/step_cpu.h"
#include "cpu/threads.h"

namespace radam {

// One after the other: an emulator needs no threads of its own.
void parallel(int threads, const std::function<void(int, int)>& body) {
  for (int thread = 0; thread < threads; ++thread) body(thread, threads);
}

namespace {

// Fields of 8 bytes each, as test_aarch64.py packs them.
struct Request {
  int64_t norm;  // a Norm of a gradient of dtype `grad`, or -1 for a step
  int64_t param, grad, state;
  int64_t scalars, segments, low_memory;  // rows of each table
  int64_t threads;
  int64_t address, size;  // of the memory, where the tables were made
};

bool read(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }

template <typename Row>
std::vector<Row> read_rows(int64_t count) {
  std::vector<Row> rows(static_cast<size_t>(count));
  if (!read(rows.data(), rows.size() * sizeof(Row))) exit(1);
  return rows;
}

void answer(const void* data, size_t size) {
  if (fwrite(data, 1, size, stdout) != size) exit(1);
}

void run(const Request& request) {
  const auto scalars = read_rows<StepScalars>(request.scalars);
  auto segments = read_rows<Segment>(request.segments);
  auto grads = read_rows<char*>(request.segments);
  auto low_memory = read_rows<LowMemory>(request.low_memory);
  // As far from 64 bytes as there.
  const size_t size = static_cast<size_t>(request.size);
  std::vector<char> block(size + 64);
  char* const memory =
      block.data() + ((request.address - reinterpret_cast<intptr_t>(block.data())) & 63);
  if (!read(memory, size)) exit(1);

  const InstructionSet& isa = instruction_sets().front();
  const int threads = static_cast<int>(request.threads);
  if (request.norm >= 0) {
    const int64_t numel = request.size / kDTypeSizes[request.grad];
    const double norm = norm_cpu({{memory, numel}}, static_cast<DType>(request.grad),
                                 static_cast<Norm>(request.norm), threads, isa);
    answer(&norm, sizeof(norm));
  } else {
    const auto move = [&](auto*& pointer) {
      if (pointer) {
        pointer = memory + (reinterpret_cast<intptr_t>(pointer) - request.address);
      }
    };
    for (Segment& row : segments) move(row.param), move(row.exp_avg), move(row.exp_avg_sq);
    for (char*& grad : grads) move(grad);
    for (LowMemory& row : low_memory) {
      move(row.remainder), move(row.exp_avg_exponent), move(row.exp_avg_sq_exponent);
    }
    const void* const* const columns = reinterpret_cast<const void* const*>(grads.data());
    step_cpu({segments.data(), columns, low_memory.data(), request.segments},
             dtype_set(static_cast<int>(request.param), static_cast<int>(request.grad),
                       static_cast<int>(request.state)),
             scalars.data(), threads, isa);
    answer(memory, size);
  }
}

}  // namespace
}  // namespace radam

int main() {
  radam::Request request;
  while (radam::read(&request, sizeof(request))) radam::run(request);
}
