// What is asked of tensors and numbers before an operator reads or writes by them.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace {

template <class... Words>
void check(bool holds, const Words&... expected) {
  TORCH_CHECK(holds, "nmfx runtime: expected ", expected...);
}

constexpr int64_t MOST = int64_t(1) << 40;    // floats of one tensor or buffer
constexpr int64_t LONGEST = int64_t(1) << 30;  // of a picture's sides, padding and dilation
constexpr int64_t WIDEST_STEP = 256;           // of strides, whose phases have memory of their own

// Of sizes from outside, none negative: their product, which does not overflow.
int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  bool fits = true;
  for (const int64_t size : sizes) fits = fits && size >= 0 && !__builtin_mul_overflow(all, size, &all) && all <= MOST;
  check(fits, "sizes of a tensor that can be");
  return all;
}

bool within(at::IntArrayRef numbers, int64_t least, int64_t most) {
  return std::all_of(numbers.begin(), numbers.end(), [&](int64_t one) { return least <= one && one <= most; });
}

// A tensor of this type in memory that is there: a storage can be smaller than what a tensor says of itself.
bool sound(const at::Tensor& t, at::ScalarType type) {
  if (!t.defined() || t.scalar_type() != type || t.layout() != at::kStrided || !t.device().is_cpu() || t.is_neg()) return false;
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return t.const_data_ptr() && (last + 1) * t.itemsize() <= static_cast<int64_t>(t.storage().nbytes());
}
bool packed_in_order(const at::Tensor& t, at::ScalarType type) { return sound(t, type) && t.is_contiguous(); }
bool line(const at::Tensor& t, at::ScalarType type) { return packed_in_order(t, type) && t.dim() == 1; }
bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// What indexes within the values of some tensors reach; what else was asked of these values held.
struct Reach {
  int64_t least, most;
};

// The values of tensors that the kernel indexes by are read through once, and again when PyTorch says that they have changed.
class Known {
  static constexpr size_t TENSORS = 4, NUMBERS = 6;
  struct Version {
    c10::weak_intrusive_ptr<c10::TensorImpl> tensor;  // its address is nobody else's as long as this is held
    const void* data;
    int64_t number, count;

    explicit Version(const at::Tensor& t)
        : tensor(t.getIntrusivePtr()), data(t.const_data_ptr()), number(t._version()), count(t.numel()) {}
    bool is(const at::Tensor& t) const {
      return tensor._unsafe_get_target() == t.unsafeGetTensorImpl() && data == t.const_data_ptr() && number == t._version() &&
             count == t.numel();
    }
  };
  struct Entry {
    std::vector<Version> versions;
    std::array<int64_t, NUMBERS> asked;
    Reach reach;
  };
  std::shared_mutex mutex;
  std::unordered_map<const c10::TensorImpl*, Entry> entries;
  size_t cleared = 64;

 public:
  using Numbers = std::array<int64_t, NUMBERS>;

  template <class Read>
  Reach reach(std::initializer_list<const at::Tensor*> tensors, const Numbers& asked, const Read& read) {
    const c10::TensorImpl* key = (*tensors.begin())->unsafeGetTensorImpl();
    for (const at::Tensor* one : tensors)
      if (one->is_inference()) return read();  // which have no versions
    {
      const std::shared_lock lock(mutex);
      const auto found = entries.find(key);
      if (found != entries.end() && found->second.asked == asked && found->second.versions.size() == tensors.size() &&
          std::equal(tensors.begin(), tensors.end(), found->second.versions.begin(),
                     [](const at::Tensor* one, const Version& version) { return version.is(*one); }))
        return found->second.reach;
    }
    Entry entry{{}, asked, {}};
    for (const at::Tensor* one : tensors) entry.versions.emplace_back(*one);
    entry.reach = read();
    const std::unique_lock lock(mutex);
    if (entries.size() >= 2 * cleared) {  // those of tensors that are no more
      std::erase_if(entries, [](const auto& one) { return one.second.versions[0].tensor.expired(); });
      cleared = std::max<size_t>(64, entries.size());
    }
    entries.insert_or_assign(key, std::move(entry));
    return entries.at(key).reach;
  }
};
Known& known = *new Known;  // for as long as the process is there

// Where numbers of a tensor lie that index as they are; nothing is reached by those below zero.
Reach reach_of(const at::Tensor& numbers) {
  return known.reach({&numbers}, {}, [&] {
    const int32_t* at = numbers.const_data_ptr<int32_t>();
    const auto [least, most] = std::minmax_element(at, at + numbers.numel());
    return Reach{*least, *most};
  });
}

// What is added to an output; with `over` the output may be written where it is, which only programs say.
struct Residual {
  std::optional<at::Tensor> tensor;
  bool over = false;

  Residual() = default;
  Residual(const std::optional<at::Tensor>& tensor) : tensor(tensor) {}
};

// How torch gives an argument.
template <class A>
struct Given {
  using type = A;
};
template <>
struct Given<const Residual&> {
  using type = const std::optional<at::Tensor>&;
};
// What torch calls: memory that cannot be had is an error as every other.
template <auto F>
struct Guarded;
template <class R, class... A, R (*F)(A...)>
struct Guarded<F> {
  static R call(typename Given<A>::type... arguments) {
    try {
      return F(arguments...);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK(false, "nmfx runtime: not enough memory for these sizes");
    } catch (const std::length_error&) {
      TORCH_CHECK(false, "nmfx runtime: not enough memory for these sizes");
    }
  }
};

}  // namespace
