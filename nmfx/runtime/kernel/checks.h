// What is asked of tensors and numbers before an operator reads or writes by them.

#pragma once

#include <array>
#include <map>
#include <optional>
#include <shared_mutex>

#include "tensor.h"

namespace {

inline bool within(Sizes numbers, int64_t least, int64_t most) {
  return std::all_of(numbers.begin(), numbers.end(), [&](int64_t one) { return least <= one && one <= most; });
}
inline bool sound(const Tensor& t, Type type) { return t.defined() && t.type == type; }
inline bool packed_in_order(const Tensor& t, Type type) { return sound(t, type) && t.is_contiguous(); }
inline bool line(const Tensor& t, Type type) { return packed_in_order(t, type) && t.dim() == 1; }
inline bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// What indexes within the values of some tensors reach; what else was asked of these values held.
struct Reach {
  int64_t least, most;
};

// The values of tensors that a program indexes by are read through once, where they are its own and never change.
class Known {
 public:
  enum Asked : int64_t { WEIGHTS, OFFSETS, HALO, INDEX, BLOCKS, SCALES };  // of the same values, different things
  using Numbers = std::array<int64_t, 7>;  // what is asked first

  template <class Read>
  Reach reach(std::initializer_list<const Tensor*> tensors, const Numbers& asked, const Read& read) {
    std::pair<std::array<const void*, 3>, Numbers> key{{}, asked};
    size_t i = 0;
    for (const Tensor* one : tensors) {
      if (!one->constant) return read();
      key.first[i++] = one->data;
    }
    {
      const std::shared_lock lock(mutex);
      const auto found = entries.find(key);
      if (found != entries.end()) return found->second;
    }
    const Reach reach = read();
    const std::unique_lock lock(mutex);
    return entries.emplace(key, reach).first->second;
  }

 private:
  std::shared_mutex mutex;
  std::map<std::pair<std::array<const void*, 3>, Numbers>, Reach> entries;
};
thread_local Known* known;  // of the program that runs

// Where numbers of a tensor lie that index as they are; nothing is reached by those below zero.
inline Reach reach_of(const Tensor& numbers) {
  return known->reach({&numbers}, {Known::OFFSETS}, [&] {
    const int32_t* at = numbers.const_data_ptr<int32_t>();
    const auto [least, most] = std::minmax_element(at, at + numbers.numel());
    return Reach{*least, *most};
  });
}

// What is added to an output; with `over` the output may be written where it is.
struct Residual {
  std::optional<Tensor> tensor;
  bool over = false;
};

}  // namespace
