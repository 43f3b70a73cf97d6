// Where outputs are written: memory that goes round in a chain of operators.

#pragma once


#include <algorithm>
#include <new>
#include <vector>

#include "tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Memory for what is between the operators of a chain. Buffers go round, so that what is written is still in some cache, in
// huge pages where the system has them; they stay with their thread.
struct Pool {
  struct Buffer {
    float* data;
    int64_t size, used;  // in which pass it was last
  };
  static constexpr int64_t IDLE = 32;  // passes after which a buffer is given back
  static constexpr int64_t HUGE_PAGE = 1 << 21;  // bytes
  int64_t passes = 0;
  size_t made = 0;  // buffers, those in use with them
  std::vector<Buffer> free;
  bool open = false;

  static std::align_val_t alignment(int64_t floats) {
    return std::align_val_t(floats * static_cast<int64_t>(sizeof(float)) >= HUGE_PAGE ? HUGE_PAGE : 64);
  }
  void release(const Buffer& buffer) {
    ::operator delete(buffer.data, alignment(buffer.size));
    --made;
  }
  ~Pool() {
    for (const Buffer& buffer : free) release(buffer);
  }
  // After a pass: what was made for others does not keep memory and caches from what runs now.
  void rest() {
    open = false;
    ++passes;
    std::erase_if(free, [&](const Buffer& buffer) {
      const bool idle = passes - buffer.used > IDLE;
      if (idle) release(buffer);
      return idle;
    });
  }
  // The smallest that is large enough, of equals the one used last; a new one takes the place of one that is too small.
  Buffer take(int64_t size) {
    auto best = free.end();
    for (auto it = free.begin(); it != free.end(); ++it)
      if (it->size >= size && (best == free.end() || it->size <= best->size)) best = it;
    if (best != free.end()) {
      const Buffer found{best->data, best->size, passes};
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
    free.reserve(made + 1);  // so that giving it back needs no memory
    void* data = ::operator new(room * sizeof(float), alignment(room));
    ++made;
#ifdef __linux__
    if (bytes >= HUGE_PAGE) madvise(data, room * sizeof(float), MADV_HUGEPAGE);
#endif
    return {static_cast<float*>(data), room, passes};
  }
};
thread_local Pool pool;

inline Tensor pooled(const Pool::Buffer& buffer, Sizes sizes, Sizes strides = {}) {
  const auto back = [buffer](void*) { pool.free.push_back(buffer); };
  Tensor made = Tensor::of(buffer.data, {buffer.data, back}, Type::FLOAT, sizes, strides);
  made.pooled = true;
  return made;
}

// An output that nobody has written yet: of the pool within a chain.
inline Tensor output(Sizes sizes) {
  if (!pool.open) return Tensor::empty(sizes);
  return pooled(pool.take(product(sizes)), sizes);
}

// The same of strips, the first of the sizes: each has its share of the buffer, however much of it is used, so that a thread that
// works on one strip always writes lines that it wrote before.
inline Tensor output_strips(Sizes sizes) {
  if (!pool.open) return Tensor::empty(sizes);
  constexpr int64_t PAGE = 1024;  // floats
  int64_t size = 1;
  std::vector<int64_t> strides(sizes.size());
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = size;
    size = product({size, sizes[i]});
  }
  const Pool::Buffer buffer = pool.take((strides[0] + PAGE - 1) / PAGE * PAGE * sizes[0]);
  strides[0] = buffer.size / sizes[0] / PAGE * PAGE;
  return pooled(buffer, sizes, {strides.data(), strides.size()});
}

}  // namespace
