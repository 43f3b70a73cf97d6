// Several operators by one call, and what torch is told of all of them.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/narrow.h>
#include <torch/library.h>

#include <vector>

#include "lanes_operators.h"
#include "operators.h"
#include "program.h"
#include "rearrange.h"
#include "table.h"  // of nmfx/runtime/operators.py, written where the kernel is built

namespace {

at::Tensor step(Program& p) {
  switch (p.number()) {
#define CALL(NUMBER, name) case NUMBER: return p.call(&name);
    NMFX_OPERATORS(CALL)
#undef CALL
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
    p.leaves.push_back(*kind == FLATTEN ? kind[1] >= 0 && p.leaves[kind[1]] : leaves);  // which shares the memory of what it flattens
    for (const int64_t place : p.numbers()) {
      p.slot(place);
      slots[place] = at::Tensor();
    }
  }
  std::vector<at::Tensor> outputs;
  for (const int64_t place : p.numbers()) {
    outputs.push_back(p.slot(place));
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
#define CALL(name) m.impl(#name, &Guarded<&name>::call);
  NMFX_TORCH_OPERATORS(CALL)
#undef CALL
  m.impl("chain", &Guarded<&chain>::call);
}
