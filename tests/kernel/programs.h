// What the kernel is given: programs, written number by number, with their tensors; and memory that a test can let run out.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "nmfx_kernel.h"

// Memory that runs out when a test says so: no piece is larger than `largest`, and after `remaining` pieces there are no more.
namespace {
std::atomic<size_t> largest{size_t(1) << 28};
std::atomic<int64_t> remaining{INT64_MAX};

[[maybe_unused]] void* get(size_t size, size_t alignment) {
  void* data = nullptr;
  if (size > largest || remaining.fetch_sub(1) <= 0 || posix_memalign(&data, alignment, size)) throw std::bad_alloc();
  return data;
}
}  // namespace
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1  // as GCC says it
#endif
#endif
#if __SANITIZE_THREAD__  // which needs memory before anything of this program is ready to run
constexpr bool MEMORY_CAN_RUN_OUT = false;
#else
constexpr bool MEMORY_CAN_RUN_OUT = true;
void* operator new(size_t size) { return get(size, 16); }
void* operator new(size_t size, std::align_val_t alignment) { return get(size, static_cast<size_t>(alignment)); }
void operator delete(void* data) noexcept { free(data); }
void operator delete(void* data, size_t) noexcept { free(data); }
void operator delete(void* data, std::align_val_t) noexcept { free(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { free(data); }
#endif

namespace {

using Numbers = std::vector<int64_t>;
using Floats = std::vector<float>;
constexpr double INF = std::numeric_limits<double>::infinity(), ROUNDING = 1.0 / (1 << 24);
constexpr int32_t IN_STRIP = 1 << 22, NO_PIXEL = 1 << 20;  // as the kernel has them
enum Code { CONV, LINEAR, DEPTHWISE, MAX_POOL, AVERAGE, FLATTEN, REARRANGE, LANES_CONV, LANES_CHANNEL, LANES_AVERAGE,
            QUANTIZED_LINEAR, PLANES_OF, PLANES_AGAIN, PLANES_CONV, PLANES_MAX_POOL, PLANES_AVERAGE, PLAIN_OF_PLANES };
constexpr Code LAST = PLAIN_OF_PLANES;
const char* const CODES[] = {"sparse_conv2d", "sparse_linear", "depthwise_conv2d", "max_pool2d", "average", "flatten",
                             "rearrange", "lanes_conv2d", "lanes_by_channel", "lanes_average", "quantized_linear",
                             "planes_of", "planes_again", "planes_conv", "planes_max_pool", "planes_average", "plain_of_planes"};

std::string running;  // the case
void must(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s (nmfx_error: %s)\n", running.c_str(), what.c_str(), nmfx_error());
  std::exit(1);
}
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
bool alike(const Floats& one, const Floats& other) {  // bit for bit
  return one.size() == other.size() && (one.empty() || !std::memcmp(one.data(), other.data(), one.size() * sizeof(float)));
}
int64_t bits(double number) {
  int64_t same;
  std::memcpy(&same, &number, 8);
  return same;
}

struct Array {
  Numbers shape, strides;  // strides may be empty
  uint8_t code = 2, width = 32;
  std::vector<char> bytes;

  template <class T>
  Array(Numbers shape, const std::vector<T>& values, Numbers strides = {})
      : shape(shape), strides(strides), code(std::is_same_v<T, uint8_t> ? 1 : std::is_integral_v<T> ? 0 : 2), width(sizeof(T) * 8) {
    bytes.resize(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  }
  DLTensor view() const {
    auto* data = const_cast<char*>(bytes.data());
    auto *sizes = const_cast<int64_t*>(shape.data()), *steps = const_cast<int64_t*>(strides.data());
    return {data, {1, 0}, static_cast<int32_t>(shape.size()), {code, width, 1}, sizes, strides.empty() ? nullptr : steps, 0};
  }
};
template <class T>
Array line(const std::vector<T>& values) {
  return {{static_cast<int64_t>(values.size())}, values};
}
std::vector<DLTensor> views(const std::vector<Array>& all) {
  std::vector<DLTensor> found;
  for (const Array& one : all) found.push_back(one.view());
  return found;
}

using Program = std::unique_ptr<nmfx_program, decltype(&nmfx_program_free)>;
struct Freed {
  void operator()(DLManagedTensor* one) const { one->deleter(one); }
};
using Output = std::unique_ptr<DLManagedTensor, Freed>;

// A program as it is written: inputs first, then a slot for every step.
struct Net {
  std::vector<Array> inputs, constants;
  Numbers steps;
  int64_t count = 0;

  int64_t input(Array one) { return inputs.push_back(std::move(one)), inputs.size() - 1; }
  int64_t constant(Array one) { return constants.push_back(std::move(one)), -1 - static_cast<int64_t>(constants.size()); }
  int64_t add(Code code, const Numbers& arguments, bool leaves = false, const Numbers& done = {}) {
    steps.insert(steps.end(), {leaves, code});
    steps.insert(steps.end(), arguments.begin(), arguments.end());
    steps.push_back(done.size());
    steps.insert(steps.end(), done.begin(), done.end());
    return inputs.size() + count++;
  }
  Numbers numbers() const {  // of any inputs; the last slot is the output
    Numbers all{static_cast<int64_t>(inputs.size())};
    all.resize(1 + inputs.size());
    all.push_back(count);
    all.insert(all.end(), steps.begin(), steps.end());
    all.insert(all.end(), {1, static_cast<int64_t>(inputs.size()) + count - 1});
    return all;
  }
  Program program(const Numbers& numbers) const {
    const auto given = views(constants);
    return {nmfx_program_new(numbers.data(), numbers.size(), given.data(), given.size()), nmfx_program_free};
  }
  nmfx_status run(nmfx_program* program, int64_t threads, int64_t images, Output& out) const {
    const auto given = views(inputs);
    DLManagedTensor* made = nullptr;
    const nmfx_status status = nmfx_program_run(program, given.data(), given.size(), images, threads, &made, 1);
    out.reset(made);
    return status;
  }
};
Numbers joined(std::initializer_list<Numbers> all) {
  Numbers found;
  for (const Numbers& one : all) found.insert(found.end(), one.begin(), one.end());
  return found;
}
Floats values_of(const DLManagedTensor& one) {
  const DLTensor& t = one.dl_tensor;
  int64_t count = 1;
  for (int32_t i = t.ndim - 1; i >= 0; --i) {
    must(t.shape[i] == 1 || t.strides[i] == count || !count, "an output in order");
    count *= t.shape[i];
  }
  const auto* data = static_cast<const float*>(t.data);
  const auto* bytes = static_cast<const uint8_t*>(t.data);
  return t.dtype.bits == 8 ? Floats(bytes, bytes + count) : Floats(data, data + count);
}

}  // namespace
