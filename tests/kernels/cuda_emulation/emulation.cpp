// What tests may ask of the emulation.
#include <utility>

#include "cuda_runtime.h"

extern "C" {

void run_only_blocks(unsigned first, unsigned end) {
  emulated_first_block = first;
  emulated_end_block = end;
}

void run_blocks_backwards(bool backwards) { emulated_backwards = backwards; }

int current_device() { return emulated_device; }
int device_of_last_launch() { return emulated_launch_device; }

// Launches since the last call, and the bytes that they uploaded.
int64_t take_launches() { return std::exchange(emulated_launches, 0); }
int64_t take_uploaded() { return std::exchange(emulated_uploaded, 0); }
}
