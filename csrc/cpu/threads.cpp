// Uses torch's thread pool: a second pool would compete with it for the cores. Nothing is linked,
// because the file with torch's OpenMP runtime differs from wheel to wheel. torch loads it with
// global symbols, and both GNU's and LLVM's runtime export the three that are needed here.
#include "cpu/threads.h"

#include <dlfcn.h>

#include <system_error>
#include <thread>
#include <vector>

namespace radam {
namespace {

struct OpenMP {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();

  OpenMP()
      : parallel(reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
        thread_num(reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))),
        num_threads(reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))) {}

  // All three must come from one library: in another one, each thread would have number 0.
  bool found() const {
    return parallel && thread_num && num_threads && home(parallel) == home(thread_num) &&
           home(parallel) == home(num_threads);
  }

 private:
  template <typename Function>
  static const void* home(Function function) {
    Dl_info info = {};
    dladdr(reinterpret_cast<void*>(function), &info);
    return info.dli_fbase;
  }
};

// Null if no OpenMP runtime is loaded.
const OpenMP* openmp() {
  static const OpenMP all;
  static const OpenMP* const found = all.found() ? &all : nullptr;
  return found;
}

using Body = std::function<void(int, int)>;

}  // namespace

void parallel(int threads, const Body& body) {
  if (threads <= 1) return body(0, 1);
  if (const OpenMP* omp = openmp()) {
    // The team can be smaller than requested, so the body gets its actual size.
    const auto run = [](void* data) {
      (*static_cast<const Body*>(data))(openmp()->thread_num(), openmp()->num_threads());
    };
    return omp->parallel(run, const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    try {
      others.emplace_back(body, t, threads);
    } catch (const std::system_error&) {  // the system has no more threads
      body(t, threads);
    }
  }
  body(0, threads);
  for (std::thread& other : others) other.join();
}

const char* threads_from() { return openmp() ? "OpenMP" : "std::thread"; }

}  // namespace radam
