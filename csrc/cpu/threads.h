// Threads for the CPU kernel, from the OpenMP runtime that torch has already loaded.
#pragma once

#include <functional>

namespace radam {

// Calls body(thread, threads) on `threads` threads at most and waits for all of them.
void parallel(int threads, const std::function<void(int, int)>& body);

// Where the threads come from: "OpenMP" or "std::thread".
const char* threads_from();

}  // namespace radam
