// Several operators by one call, and the functions of nmfx_kernel.h.

#include "nmfx_kernel.h"

#include <cstdio>

#include "lanes_operators.h"
#include "operators.h"
#include "program.h"
#include "quantized.h"
#include "rearrange.h"

// What programs can call, by their numbers; a new one goes to the end.
#define NMFX_OPERATORS(DO)                                                                                              \
  DO(sparse_conv2d) DO(sparse_linear) DO(depthwise_conv2d) DO(max_pool2d) DO(average) DO(flatten) DO(rearrange) \
  DO(lanes_conv2d) DO(lanes_by_channel) DO(lanes_average)                                                               \
  DO(quantized_linear) DO(planes_of) DO(planes_again) DO(planes_conv) DO(planes_max_pool) DO(planes_average) DO(plain_of_planes)

struct nmfx_program {
  std::vector<int64_t> numbers;
  std::vector<Tensor> constants;
  Known known;
};

namespace {

enum Code : int64_t {
#define CODE(name) CODE_##name,
  NMFX_OPERATORS(CODE)
#undef CODE
};
constexpr const char* NAMES[] = {
#define NAME(name) #name,
    NMFX_OPERATORS(NAME)
#undef NAME
};

Tensor step(Program& p) {
  switch (p.number()) {
#define CALL(name) case CODE_##name: return p.call(&name);
    NMFX_OPERATORS(CALL)
#undef CALL
    default: check(false, "a program of this version");
  }
  return {};
}

// One pass: the inputs are the first slots, each step fills the next, and slots that nobody reads any more are emptied. Before
// a step stands whether its result leaves the chain.
std::vector<Tensor> pass(nmfx_program& program, const std::vector<Tensor>& inputs) {
  known = &program.known;
  std::vector<Tensor> slots(inputs);
  const struct Closing {
    ~Closing() { pool.rest(); }
  } closing;
  const int64_t* numbers = program.numbers.data();
  Program p{numbers, numbers + program.numbers.size(), program.constants, slots};
  p.check_inputs();
  const int64_t steps = p.number();
  check(0 <= steps && steps <= static_cast<int64_t>(program.numbers.size()), "a program that is whole");
  slots.reserve(inputs.size() + steps);  // steps hold references into it
  for (int64_t i = 0; i < steps; ++i) {
    pool.open = p.number() == 0;  // what leaves the chain is the caller's
    slots.push_back(step(p));
    for (const int64_t place : p.numbers()) {
      p.slot(place);
      slots[place] = Tensor();
    }
  }
  std::vector<Tensor> outputs;
  for (const int64_t place : p.numbers()) {
    const Tensor& one = p.slot(place);
    check(!one.pooled && !one.constant, "outputs that may leave the chain");
    outputs.push_back(one.memory ? one : one.copied());  // an input is the caller's
  }
  check(p.at == p.end, "a program that is whole");
  return outputs;
}

// A sample of a batch and those after it.
Tensor part_of(const Tensor& whole, int64_t start, int64_t count) {
  Tensor part = whole;
  part.shape[0] = count;
  part.data = static_cast<char*>(part.data) + start * part.steps[0] * BYTES[int(part.type)];
  return part;
}

// The steps of a program, one after the other; with `images` > 0 in passes of so many, each of which stays on one thread.
std::vector<Tensor> chain(nmfx_program& program, const std::vector<Tensor>& inputs, int64_t images) {
  check(!inputs.empty() && inputs[0].dim() > 0, "inputs with a batch");
  const int64_t batch = inputs[0].size(0);
  for (const Tensor& input : inputs) images = input.dim() > 1 && input.size(0) == batch ? images : 0;
  const int64_t passes = 0 < images && images < batch ? (batch + images - 1) / images : 1;
  if (passes < 2) return pass(program, inputs);
  std::vector<std::vector<Tensor>> parts(passes);
  parallel_for(0, passes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::vector<Tensor> mine;
      const int64_t start = part * images;
      for (const Tensor& input : inputs) mine.push_back(part_of(input, start, std::min(images, batch - start)));
      parts[part] = pass(program, mine);
    }
  });
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < parts[0].size(); ++i) {
    std::vector<int64_t> sizes(parts[0][i].sizes().begin(), parts[0][i].sizes().end());
    check(!sizes.empty(), "outputs with a batch");
    sizes[0] = 0;
    for (const auto& part : parts) {
      check(same(part[i].sizes().slice(1), parts[0][i].sizes().slice(1)), "outputs of one size");
      sizes[0] += part[i].size(0);
    }
    outputs.push_back(Tensor::empty({sizes.data(), sizes.size()}, parts[0][i].type));
    char* to = static_cast<char*>(outputs.back().data);
    for (const auto& part : parts) {
      part[i].copy_to(to);
      to += part[i].numel() * BYTES[int(part[i].type)];
    }
  }
  return outputs;
}

thread_local char said[1024];  // the error of the last call that failed, for which there is always room

template <class F>
nmfx_status guarded(const F& f) noexcept {
  try {
    f();
    return NMFX_OK;
  } catch (const Refused& error) {
    std::snprintf(said, sizeof said, "%s", error.what());
    return NMFX_REFUSED;
  } catch (const std::exception&) {  // bad_alloc, or length_error of a vector
    std::snprintf(said, sizeof said, "nmfx runtime: not enough memory for these sizes");
    return NMFX_NO_MEMORY;
  }
}

}  // namespace

extern "C" {

int32_t nmfx_version(void) { return NMFX_VERSION; }
#ifndef NMFX_VARIANT
#define NMFX_VARIANT ""
#endif
const char* nmfx_variant(void) { return NMFX_VARIANT; }
int64_t nmfx_vector_length(void) { return VL; }
const char* nmfx_operator_name(int64_t code) { return 0 <= code && code < int64_t(std::size(NAMES)) ? NAMES[code] : nullptr; }
const char* nmfx_error(void) { return said; }

nmfx_program* nmfx_program_new(const int64_t* numbers, int64_t count, const DLTensor* constants, int64_t constant_count) {
  std::unique_ptr<nmfx_program> made;
  const nmfx_status status = guarded([&] {
    check(0 <= count && count <= MOST && (numbers || !count), "the numbers of a program");
    check(0 <= constant_count && constant_count <= LONGEST && (constants || !constant_count), "the constants of a program");
    made = std::make_unique<nmfx_program>();
    made->numbers.assign(numbers, numbers + count);
    for (int64_t i = 0; i < constant_count; ++i) {
      made->constants.push_back(tensor_of(constants[i]).copied());
      made->constants.back().constant = true;
    }
  });
  return status == NMFX_OK ? made.release() : nullptr;
}

void nmfx_program_free(nmfx_program* program) { delete program; }

nmfx_status nmfx_program_run(nmfx_program* program, const DLTensor* inputs, int64_t input_count, int64_t images,
                             int64_t threads, DLManagedTensor** outputs, int64_t output_count) {
  return guarded([&] {
    check(program && 0 <= input_count && input_count <= LONGEST && (inputs || !input_count), "a program and its inputs");
    check(1 <= threads && threads <= 4096 && 0 <= images, "threads of 1 to 4,096, and passes of no fewer images than 0");
    check(0 <= output_count && (outputs || !output_count), "room for outputs");
    std::vector<Tensor> given;
    for (int64_t i = 0; i < input_count; ++i) given.push_back(tensor_of(inputs[i]));
    allowed = threads;
    const std::vector<Tensor> made = chain(*program, given, images);
    check(output_count == static_cast<int64_t>(made.size()), "room for ", made.size(), " outputs, got ", output_count);
    struct Back {
      void operator()(DLManagedTensor* one) const { one->deleter(one); }
    };
    std::vector<std::unique_ptr<DLManagedTensor, Back>> leaving;
    leaving.reserve(made.size());  // what is handed to it has no other owner
    for (const Tensor& one : made) leaving.emplace_back(Leaving::of(one));
    for (int64_t i = 0; i < output_count; ++i) outputs[i] = leaving[i].release();
  });
}

void nmfx_use_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*number)(void), int (*team)(void)) {
  openmp = parallel && number && team ? OpenMP{parallel, number, team} : OpenMP{};
}

}  // extern "C"
