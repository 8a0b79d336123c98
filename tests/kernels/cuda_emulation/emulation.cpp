// The CUDA kernels and their launchers, emulated, and what tests may ask of the emulation.
#include <utility>

#include "step_cuda.cu"

extern "C" {

void run_only_blocks(unsigned first, unsigned end) {
  emulated_first_block = first;
  emulated_end_block = end;
}

int current_device() { return emulated_device; }
int device_of_last_launch() { return emulated_launch_device; }

// Launches since the last call, and the bytes that they uploaded.
int64_t take_launches() { return std::exchange(emulated_launches, 0); }
int64_t take_uploaded() { return std::exchange(emulated_uploaded, 0); }
}
