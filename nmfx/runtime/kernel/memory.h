// Where outputs are written: memory that goes round in a chain of operators.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

void check(bool holds, const char* expected) { TORCH_CHECK(holds, "nmfx runtime: expected ", expected); }

// Memory for what is between the operators of a chain. Buffers go round, so that what is written is still in some cache, in
// huge pages where the system has them; they stay with their thread.
struct Pool {
  struct Buffer {
    float* data;
    int64_t size;
  };
  static constexpr int64_t HUGE_PAGE = 1 << 21;  // bytes
  std::vector<Buffer> free;
  bool open = false;

  static std::align_val_t alignment(int64_t floats) {
    return std::align_val_t(floats * static_cast<int64_t>(sizeof(float)) >= HUGE_PAGE ? HUGE_PAGE : 64);
  }
  static void release(const Buffer& buffer) { ::operator delete(buffer.data, alignment(buffer.size)); }
  ~Pool() {
    for (const Buffer& buffer : free) release(buffer);
  }
  // The smallest that is large enough, of equals the one used last; a new one takes the place of one that is too small.
  Buffer take(int64_t size) {
    auto best = free.end();
    for (auto it = free.begin(); it != free.end(); ++it)
      if (it->size >= size && (best == free.end() || it->size <= best->size)) best = it;
    if (best != free.end()) {
      const Buffer found = *best;
      free.erase(best);
      return found;
    }
    if (!free.empty()) {
      const auto largest = std::max_element(free.begin(), free.end(), [](auto& a, auto& b) { return a.size < b.size; });
      release(*largest);
      free.erase(largest);
    }
    const int64_t bytes = size * static_cast<int64_t>(sizeof(float)), unit = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    const int64_t room = (bytes + unit - 1) / unit * unit / static_cast<int64_t>(sizeof(float));
    void* data = ::operator new(room * sizeof(float), alignment(room));
#ifdef __linux__
    if (bytes >= HUGE_PAGE) madvise(data, room * sizeof(float), MADV_HUGEPAGE);
#endif
    return {static_cast<float*>(data), room};
  }
};
thread_local Pool pool;

// An output that nobody has written yet: of the pool within a chain.
at::Tensor output(at::IntArrayRef sizes, const at::Tensor& like) {
  if (!pool.open) return at::empty(sizes, like.options());
  int64_t size = 1;
  for (const int64_t one : sizes) size *= one;
  const Pool::Buffer buffer = pool.take(size);
  return at::from_blob(buffer.data, sizes, [buffer](void*) { pool.free.push_back(buffer); }, like.options());
}

}  // namespace
