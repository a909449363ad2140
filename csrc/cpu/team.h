// A team of threads for one call.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <future>
#include <system_error>
#include <thread>
#include <vector>

namespace rnnkern::cpu {

// Is this process a forked child? libgomp's threads stayed with its parent, and the child would wait for them for ever.
inline bool is_forked = false;
inline const int kForkIsSeen = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

// body(me, size) on each of `size` threads, all running at once: at most `threads`, and fewer where there are no more. (Inside
// another parallel region libgomp gives one.)
template <class Body>
void run_team(int threads, const Body& body) {
  if (threads == 1) return body(0, 1);
  if (!is_forked) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
  std::promise<int> size;
  const std::shared_future<int> all_started = size.get_future();
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back([&body, all_started, i] { body(i, all_started.get()); });
  } catch (const std::system_error&) {  // the system has no more threads
  }
  const int started = 1 + static_cast<int>(others.size());
  size.set_value(started);
  body(0, started);
  for (std::thread& other : others) other.join();
}

}  // namespace rnnkern::cpu
