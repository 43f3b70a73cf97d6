// Work shared by threads: those of the process's OpenMP, if the host has said where that is, else the library's own.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct OpenMP {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
  int (*number)();
  int (*team)();
};
OpenMP openmp{};

thread_local bool inside = false;  // of work that is shared already
thread_local int64_t allowed = 1;  // threads of the program that this thread runs

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that wait for work: awake for a moment, since the next operator comes soon, then asleep.
class Workers {
  static constexpr int SPINS = 2000;  // some 50 microseconds
  struct Job {
    void (*work)(void*, int64_t);
    void* data;
    int64_t count;
  };
  std::mutex busy, sleeping;
  std::condition_variable wake;
  std::vector<std::thread> threads;
  std::atomic<uint64_t> turn{0};
  std::atomic<int64_t> left{0};
  Job job{};

  void wait(int64_t number, uint64_t seen) {
    for (;;) {
      for (int spin = 0; turn.load(std::memory_order_acquire) == seen && spin < SPINS; ++spin) pause();
      if (turn.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(sleeping);
        wake.wait(lock, [&] { return turn.load(std::memory_order_acquire) != seen; });
      }
      seen = turn.load(std::memory_order_acquire);
      if (number < job.count) job.work(job.data, number);
      left.fetch_sub(1, std::memory_order_release);
    }
  }

 public:
  // work(data, 0), ... work(data, count - 1), each on a thread; all on this one where the others are busy or cannot be had.
  void run(void (*work)(void*, int64_t), void* data, int64_t count) {
    const std::unique_lock mine(busy, std::try_to_lock);
    if (mine) {
      try {
        while (static_cast<int64_t>(threads.size()) + 1 < count) {
          const int64_t number = static_cast<int64_t>(threads.size()) + 1;
          threads.emplace_back([this, number, seen = turn.load()] { wait(number, seen); });
        }
      } catch (const std::system_error&) {
      }
    }
    if (!mine || static_cast<int64_t>(threads.size()) + 1 < count) {
      for (int64_t i = 0; i < count; ++i) work(data, i);
      return;
    }
    job = {work, data, count};
    left.store(static_cast<int64_t>(threads.size()), std::memory_order_relaxed);
    {
      const std::lock_guard lock(sleeping);
      turn.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    work(data, 0);
    for (int spin = 0; left.load(std::memory_order_acquire); ++spin) spin < SPINS ? pause() : std::this_thread::yield();
  }
};

// Never destroyed: its threads run as long as the process. A child of fork has none of them, and gets new ones.
inline Workers*& workers() {
  static Workers* own = [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { workers() = new Workers; });
#endif
    return new Workers;
  }();
  return own;
}

// f(begin, end) for parts of [begin, end), at least `grain` long, as even as can be; what one throws, the call throws.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t all = end - begin, tasks = inside ? 1 : std::min(allowed, (all + grain - 1) / std::max<int64_t>(1, grain));
  if (tasks < 2) return f(begin, end);
  struct Shared {
    const F& f;
    int64_t begin, end, tasks;
    std::atomic<bool> failed{false};
    std::exception_ptr error{};

    void task(int64_t number, int64_t tasks) {
      const int64_t size = (end - begin + tasks - 1) / tasks, from = begin + number * size;
      if (from >= end) return;
      inside = true;
      try {
        f(from, std::min(end, from + size));
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
      inside = false;
    }
  } shared{f, begin, end, tasks};
  if (openmp.parallel) {  // which may give fewer threads than it is asked for
    openmp.parallel([](void* data) { static_cast<Shared*>(data)->task(openmp.number(), openmp.team()); }, &shared,
                    static_cast<unsigned>(tasks), 0);
  } else {
    workers()->run([](void* data, int64_t number) { auto* own = static_cast<Shared*>(data); own->task(number, own->tasks); },
                   &shared, tasks);
  }
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace
