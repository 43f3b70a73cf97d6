// Several operators by one call, and what torch is told of all of them.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/flatten.h>
#include <ATen/ops/narrow.h>
#include <torch/library.h>

#include <bit>
#include <vector>

#include "lanes_operators.h"
#include "operators.h"

namespace {

// What the operators of a chain read, one number after the other: nmfx/runtime/program.py writes it.
struct Program {
  const int64_t *at, *end;
  const std::vector<at::Tensor>& constants;
  std::vector<at::Tensor>& slots;
  size_t inputs = slots.size();
  std::vector<bool> leaves = std::vector<bool>(inputs, true);  // whether the memory of a slot may leave the chain

  int64_t number() {
    check(at < end, "a program that is whole");
    return *at++;
  }
  double real() { return std::bit_cast<double>(number()); }
  at::IntArrayRef numbers() {
    const int64_t count = number();
    check(0 <= count && count <= end - at, "a program that is whole");
    at += count;
    return {at - count, static_cast<size_t>(count)};
  }
  const at::Tensor& in(const std::vector<at::Tensor>& all, int64_t place) {
    check(0 <= place && place < static_cast<int64_t>(all.size()) && all[place].defined(), "places that a program has filled");
    return all[place];
  }
  const at::Tensor& slot() { return in(slots, number()); }
  const at::Tensor& constant() { return in(constants, number()); }
  std::optional<at::Tensor> optional(const std::vector<at::Tensor>& from) {
    const int64_t place = number();
    if (place == -1) return std::nullopt;
    return in(from, place);
  }
  // Whether to write over the slot that was named at `place`, which must be the chain's own.
  bool over(const int64_t* place) {
    const bool writes = number() != 0;
    check(!writes || *place >= static_cast<int64_t>(inputs), "inputs that stay as they are");
    return writes;
  }
  Lanes lanes() {
    Lanes found{};
    for (int64_t* one : {&found.rows, &found.width, &found.pitch, &found.length, &found.before, &found.vectors, &found.strips,
                         &found.left, &found.right}) {
      *one = number();
    }
    return found;
  }
  Stride stride() {
    const int64_t down = number(), across = number();
    return {down, across, numbers()};
  }
  Laid picture() {
    const at::Tensor& x = slot();
    return laid(x, lanes());
  }
  After after() {
    std::optional<Laid> residual;
    const bool added = number() != 0;
    const int64_t* place = at;
    if (added) residual = picture();
    const auto mask = optional(constants);
    const double low = real(), high = real();
    return {residual, mask, low, high, over(place)};
  }
  // Inputs as the program is for: of each its sizes, those below zero free; none where any will do.
  void check_inputs() {
    check(number() == static_cast<int64_t>(inputs), "as many inputs as the program has");
    for (size_t i = 0; i < inputs; ++i) {
      const at::IntArrayRef wanted = numbers(), found = slots[i].sizes();
      bool fits = wanted.empty() || wanted.size() == found.size();
      for (size_t d = 0; fits && d < wanted.size(); ++d) fits = wanted[d] < 0 || wanted[d] == found[d];
      check(fits, "an input of the sizes ", wanted, " that the chain is for (-1 are free), got ", found);
    }
  }
};

enum Operator : int64_t {  // nmfx/runtime/program.py counts the same
  CONV, LINEAR, DEPTHWISE, MAX_POOL, AVERAGE, FLATTEN,
  REARRANGE, LANES_CONV, LANES_DEPTHWISE, LANES_MAX_POOL, LANES_AVERAGE,
};

at::Tensor step(Program& p) {
  switch (p.number()) {
    case CONV: {
      const at::Tensor &x = p.slot(), &values = p.constant(), &columns = p.constant(), &pointers = p.constant();
      const auto bias = p.optional(p.constants);
      const int64_t* place = p.at;
      const auto residual = p.optional(p.slots);
      const int64_t out = p.number(), width = p.number();
      const auto kernel = p.numbers(), stride = p.numbers(), padding = p.numbers(), dilation = p.numbers();
      const int64_t groups = p.number();
      const double low = p.real(), high = p.real();
      const int64_t chunk = p.number(), vectors = p.number();
      return convolution(x, values, columns, pointers, bias, residual, out, width, kernel, stride, padding, dilation, groups, low,
                         high, chunk, vectors, p.over(place));
    }
    case LINEAR: {
      const at::Tensor &x = p.slot(), &values = p.constant(), &columns = p.constant(), &pointers = p.constant();
      const auto bias = p.optional(p.constants);
      const int64_t out = p.number(), width = p.number();
      const double low = p.real(), high = p.real();
      const int64_t chunk = p.number(), vectors = p.number();
      return sparse_linear(x, values, columns, pointers, bias, out, width, low, high, chunk, vectors);
    }
    case DEPTHWISE: {
      const at::Tensor &x = p.slot(), &weight = p.constant();
      const auto bias = p.optional(p.constants), residual = p.optional(p.slots);
      const auto stride = p.numbers(), padding = p.numbers(), dilation = p.numbers();
      const double low = p.real(), high = p.real();
      return depthwise_conv2d(x, weight, bias, residual, stride, padding, dilation, low, high);
    }
    case MAX_POOL: {
      const at::Tensor& x = p.slot();
      const auto kernel = p.numbers(), stride = p.numbers(), padding = p.numbers();
      return max_pool2d(x, kernel, stride, padding);
    }
    case AVERAGE: return average(p.slot());
    case FLATTEN: {
      const at::Tensor& x = p.slot();
      check(x.dim() > 1, "a batch to flatten");
      return at::flatten(x, 1);
    }
    case REARRANGE: {
      const at::Tensor &x = p.slot(), &index = p.constant();
      const bool plain = p.number() != 0;
      return rearrange(x, index, p.numbers(), plain);
    }
    case LANES_CONV: {
      const Laid x = p.picture();
      const at::Tensor &values = p.constant(), &columns = p.constant(), &pointers = p.constant(), &starts = p.constant();
      const auto bias = p.optional(p.constants);
      const int64_t channels = p.number(), out = p.number(), width = p.number(), groups = p.number();
      const int64_t chunk = p.number(), vectors = p.number();
      const Stride stride = p.stride();
      const Lanes lanes = p.lanes();
      return lanes_conv2d(x, values, columns, pointers, starts, bias, channels, out, width, groups, chunk, vectors, stride, lanes,
                          p.after());
    }
    case LANES_DEPTHWISE:
    case LANES_MAX_POOL: {
      const Laid x = p.picture();
      std::optional<Lanes> local;
      if (p.number()) local = p.lanes();
      const auto pixels = p.optional(p.constants), sources = p.optional(p.constants);
      const at::Tensor& offsets = p.constant();
      const auto weight = p.optional(p.constants), bias = p.optional(p.constants);
      const int64_t planes = p.number();
      const Stride stride = p.stride();
      const Lanes lanes = p.lanes();
      return lanes_by_channel(x, local, pixels, sources, offsets, weight, bias, planes, stride, lanes, p.after());
    }
    case LANES_AVERAGE: {
      const Laid x = p.picture();
      const at::Tensor& mask = p.constant();
      return lanes_average(x, mask, p.number());
    }
    default: TORCH_CHECK(false, "nmfx runtime: a program of another version");
  }
}

// One pass: the inputs are the first slots, each step fills the next, and slots that nobody reads any more are emptied. Before
// a step stands whether its result leaves the chain.
std::vector<at::Tensor> pass(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& constants,
                             const at::Tensor& program) {
  const int64_t* numbers = program.const_data_ptr<int64_t>();
  std::vector<at::Tensor> slots(inputs);
  const struct Closing {
    ~Closing() { pool.rest(); }
  } closing;
  Program p{numbers, numbers + program.numel(), constants, slots};
  p.check_inputs();
  const int64_t steps = p.number();
  check(0 <= steps && steps <= program.numel(), "a program that is whole");
  slots.reserve(inputs.size() + steps);  // steps hold references into it
  for (int64_t i = 0; i < steps; ++i) {
    const bool leaves = p.number() != 0;
    const int64_t* kind = p.at;
    pool.open = !leaves;  // what leaves the chain is PyTorch's
    slots.push_back(step(p));
    p.leaves.push_back(*kind == FLATTEN ? p.leaves[kind[1]] : leaves);  // which shares the memory of what it flattens
    for (const int64_t place : p.numbers()) {
      p.in(slots, place);
      slots[place] = at::Tensor();
    }
  }
  std::vector<at::Tensor> outputs;
  for (const int64_t place : p.numbers()) {
    outputs.push_back(p.in(slots, place));
    check(p.leaves[place], "outputs that may leave the chain");
  }
  check(p.at == p.end, "a program that is whole");
  return outputs;
}

// The steps of a program, one after the other; with `images` > 0 in passes of so many, each of which stays on one thread.
std::vector<at::Tensor> chain(at::TensorList inputs, at::TensorList constants, const at::Tensor& program, int64_t images) {
  check(packed_in_order(program, at::kLong), "a program of int64");
  check(!inputs.empty() && inputs[0].dim() > 0, "inputs with a batch");
  const std::vector<at::Tensor> own = constants.vec();
  const int64_t batch = inputs[0].size(0);
  for (const at::Tensor& input : inputs) images = input.dim() > 1 && input.size(0) == batch ? images : 0;
  const int64_t passes = 0 < images && images < batch ? (batch + images - 1) / images : 1;
  if (passes < 2) return pass(inputs.vec(), own, program);
  std::vector<std::vector<at::Tensor>> parts(passes);
  at::parallel_for(0, passes, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard guard;
    for (int64_t part = begin; part < end; ++part) {
      std::vector<at::Tensor> mine;
      const int64_t start = part * images;
      for (const at::Tensor& input : inputs) mine.push_back(input.narrow(0, start, std::min(images, batch - start)));
      parts[part] = pass(mine, own, program);
    }
  });
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < parts[0].size(); ++i) {
    std::vector<at::Tensor> pieces;
    for (const auto& part : parts) pieces.push_back(part[i]);
    outputs.push_back(at::cat(pieces));
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmfx, m) {
  m.def("vector_length() -> int", [] { return VL; });
}

TORCH_LIBRARY_IMPL(nmfx, CPU, m) {
  m.impl("sparse_conv2d", &Guarded<&sparse_conv2d>::call);
  m.impl("sparse_linear", &Guarded<&sparse_linear>::call);
  m.impl("depthwise_conv2d", &Guarded<&depthwise_conv2d>::call);
  m.impl("max_pool2d", &Guarded<&max_pool2d>::call);
  m.impl("average", &Guarded<&average>::call);
  m.impl("chain", &Guarded<&chain>::call);
}
