// Tensors: sizes, strides and memory, which they share or only look at.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "nmfx_kernel.h"

namespace {

struct Sizes : std::span<const int64_t> {
  using std::span<const int64_t>::span;
  Sizes(std::initializer_list<int64_t> all) : span(all.begin(), all.size()) {}  // of an argument, while it is one
  template <size_t N>
  Sizes(const std::array<int64_t, N>& all) : span(all.data(), N) {}
  Sizes slice(size_t from) const { return {data() + from, size() - from}; }
};
inline std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  return out << ']';
}
inline bool same(Sizes one, Sizes other) { return std::equal(one.begin(), one.end(), other.begin(), other.end()); }

// What was expected and is not so: the call ends, and says it.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Words>
void check(bool holds, const Words&... expected) {
  if (holds) return;
  std::ostringstream said;
  said << "nmfx runtime: expected ";
  (said << ... << expected);
  throw Refused(said.str());
}

constexpr int64_t MOST = int64_t(1) << 40;    // floats of one tensor or buffer
constexpr int64_t LONGEST = int64_t(1) << 30;  // of a picture's sides, padding and dilation
constexpr int64_t WIDEST_STEP = 256;           // of strides, whose phases have memory of their own

// Of sizes from outside, none negative: their product, which does not overflow.
inline int64_t product(Sizes sizes) {
  int64_t all = 1;
  bool fits = true;
  for (const int64_t size : sizes) fits = fits && size >= 0 && !__builtin_mul_overflow(all, size, &all) && all <= MOST;
  check(fits, "sizes of a tensor that can be");
  return all;
}

enum class Type : int8_t { FLOAT, SHORT, INT, LONG, BYTE, CHAR };
constexpr int64_t BYTES[] = {4, 2, 4, 8, 1, 1};
template <class T>
constexpr Type type_of = std::is_same_v<T, float>     ? Type::FLOAT
                         : std::is_same_v<T, int16_t> ? Type::SHORT
                         : std::is_same_v<T, int32_t> ? Type::INT
                         : std::is_same_v<T, uint8_t> ? Type::BYTE
                         : std::is_same_v<T, int8_t>  ? Type::CHAR
                                                      : Type::LONG;
constexpr std::align_val_t ALIGNMENT{64};

struct Tensor {
  static constexpr int DIMS = NMFX_DIMS;
  void* data = nullptr;
  std::shared_ptr<void> memory;  // keeps the data; without it the caller does
  Type type = Type::FLOAT;
  bool there = false;
  bool constant = false;  // of a program, whose numbers never change
  bool pooled = false;    // memory that stays with its thread
  int64_t margin = 0;     // bytes before the first and behind the last that are its own, too
  int dims = 0;
  int64_t shape[DIMS]{}, steps[DIMS]{};

  bool defined() const { return there; }
  int64_t dim() const { return dims; }
  int64_t size(int64_t i) const { return shape[i]; }
  int64_t stride(int64_t i) const { return steps[i]; }
  Sizes sizes() const { return {shape, static_cast<size_t>(dims)}; }
  int64_t numel() const {
    int64_t all = 1;
    for (int64_t i = 0; i < dims; ++i) all *= shape[i];
    return all;
  }
  template <class T>
  const T* const_data_ptr() const {
    check(type == type_of<T>, "a tensor of another type");
    return static_cast<const T*>(data);
  }
  template <class T>
  T* mutable_data_ptr() const {
    check(type == type_of<T>, "a tensor of another type");
    return static_cast<T*>(data);
  }
  // Elements from the first to behind the last.
  int64_t extent() const {
    int64_t last = 0;
    for (int64_t i = 0; i < dims; ++i) {
      if (!shape[i]) return 0;
      last += (shape[i] - 1) * steps[i];
    }
    return last + 1;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      if (shape[i] == 0) return true;
      if (shape[i] != 1 && steps[i] != step) return false;
      step *= shape[i];
    }
    return true;
  }
  bool overlaps(const Tensor& other) const {
    const auto *mine = static_cast<const char*>(data), *theirs = static_cast<const char*>(other.data);
    return mine < theirs + other.extent() * BYTES[int(other.type)] && theirs < mine + extent() * BYTES[int(type)];
  }
  // The same memory with other sizes and strides; without strides one behind the other.
  Tensor as(Sizes sizes, Sizes strides = {}) const {
    check(sizes.size() <= size_t(DIMS), "tensors of up to ", DIMS, " dimensions");
    Tensor made = *this;
    made.dims = static_cast<int>(sizes.size());
    int64_t step = 1;
    for (int64_t i = made.dims - 1; i >= 0; --i) {
      made.shape[i] = sizes[i];
      made.steps[i] = strides.empty() ? step : strides[i];
      step *= sizes[i];
    }
    return made;
  }
  static Tensor of(void* data, std::shared_ptr<void> memory, Type type, Sizes sizes, Sizes strides = {}) {
    Tensor one;
    one.data = data;
    one.memory = std::move(memory);
    one.type = type;
    one.there = true;
    return one.as(sizes, strides);
  }
  static Tensor empty(Sizes sizes, Type type = Type::FLOAT) {
    const int64_t bytes = std::max<int64_t>(1, product(sizes)) * BYTES[int(type)];
    void* data = ::operator new(bytes, ALIGNMENT);
    return of(data, std::shared_ptr<void>(data, [](void* p) { ::operator delete(p, ALIGNMENT); }), type, sizes);
  }
  Tensor copied() const {
    Tensor made = empty(sizes(), type);
    copy_to(static_cast<char*>(made.data));
    return made;
  }
  Tensor contiguous() const { return is_contiguous() ? *this : copied(); }
  // All elements, one behind the other.
  void copy_to(char* to) const {
    if (numel()) copy(static_cast<const char*>(data), 0, to);  // else there may be no memory
  }

 private:
  void copy(const char* from, int dim, char*& to) const {
    const int64_t bytes = BYTES[int(type)];
    if (dim == dims) {
      std::memcpy(to, from, bytes);
      to += bytes;
    } else if (dim == dims - 1 && steps[dim] == 1) {
      std::memcpy(to, from, shape[dim] * bytes);
      to += shape[dim] * bytes;
    } else {
      for (int64_t i = 0; i < shape[dim]; ++i) copy(from + i * steps[dim] * bytes, dim + 1, to);
    }
  }
};

// A tensor from outside, over the caller's memory.
inline Tensor tensor_of(const DLTensor& given) {
  const DLDataType kind = given.dtype;
  check(given.device.device_type == 1, "tensors on the CPU");
  const std::array<DLDataType, 6> kinds{{{2, 32, 1}, {0, 16, 1}, {0, 32, 1}, {0, 64, 1}, {1, 8, 1}, {0, 8, 1}}};  // as Type has them
  const auto found = std::find_if(kinds.begin(), kinds.end(), [&](const DLDataType& one) {
    return one.code == kind.code && one.bits == kind.bits && one.lanes == kind.lanes;
  });
  check(found != kinds.end(), "tensors of float32, int16, int32, int64, uint8 or int8");
  const Type type = static_cast<Type>(found - kinds.begin());
  check(0 <= given.ndim && given.ndim <= NMFX_DIMS && (given.shape || !given.ndim), "tensors of up to ", NMFX_DIMS, " dimensions");
  const auto dims = static_cast<size_t>(given.ndim);
  const Sizes sizes(given.shape, dims), strides(given.strides, given.strides ? dims : 0);
  const int64_t count = product(sizes);
  for (const int64_t step : strides) check(0 <= step && step <= MOST, "strides of a tensor that can be");
  int64_t last = 0;
  for (size_t i = 0; i < strides.size() && count; ++i) last += product({sizes[i] - 1, strides[i]});
  check(last <= MOST && (given.data || !count), "a tensor with memory");
  char* data = static_cast<char*>(given.data) + given.byte_offset;
  check(reinterpret_cast<uintptr_t>(data) % BYTES[int(type)] == 0, "a tensor whose elements are aligned");
  return Tensor::of(data, nullptr, type, sizes, strides);
}

// A tensor for the outside, which keeps its memory.
struct Leaving {
  DLManagedTensor managed;
  Tensor tensor;

  static DLManagedTensor* of(const Tensor& tensor) {
    auto* made = new Leaving{{}, tensor};
    const auto bits = static_cast<uint8_t>(BYTES[int(tensor.type)] * 8);
    const DLDataType kind{static_cast<uint8_t>(tensor.type == Type::FLOAT ? 2 : tensor.type == Type::BYTE), bits, 1};
    made->managed.dl_tensor = {tensor.data, {1, 0}, tensor.dims, kind, made->tensor.shape, made->tensor.steps, 0};
    made->managed.manager_ctx = made;
    made->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Leaving*>(self->manager_ctx); };
    return &made->managed;
  }
};

}  // namespace
