// The kernel alone: every operator over a grid of shapes, patterns, layouts, threads and passes, against plain loops in double, those of bytes in
// integers.
//
//   kernel_test [CASES] [FIRST]     cases of every operator (200), from which on (0); a case says its number when it fails
//
// Case k of an operator draws one point of its grid, always the same. Every second case is of small integers, whose sums
// float32 holds exactly: there nothing is forgiven. What the others may differ by is a few roundings of the sum of magnitudes.
// The kernel is linked in, built for one variant, so that the same program serves sanitisers, other processors and emulators.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "lanes_cases.h"
#include "planes_cases.h"

namespace {

Case drawn(Code code, int64_t number) {
  Draw draw(code, number);
  switch (code) {
    case CONV: case DEPTHWISE: case MAX_POOL: return plain_window(draw, code);
    case LINEAR: return linear(draw);
    case AVERAGE: case FLATTEN: case REARRANGE: return planes(draw, code);
    case LANES_CONV: case LANES_CHANNEL: case LANES_AVERAGE: return by_lanes(draw, code);
    case QUANTIZED_LINEAR: return quantized_linear(draw);
    default: return by_planes(draw, code);
  }
}

void gives_what_is_wanted(Code code, int64_t number) {
  const Case one = drawn(code, number);
  const Program program = one.net.program(one.net.numbers());
  must(program != nullptr, "a program");
  Output first;
  must(one.net.run(program.get(), 1, 0, first) == NMFX_OK, "a program that runs");
  const Floats got = values_of(*first);
  must(got.size() == one.wanted.v.size(), "an output of this size");
  const bool averages = code == AVERAGE || code == FLATTEN || code == LANES_AVERAGE;
  const double forgiven = one.exact ? 0 : (number % 2 ? 2 * averages : one.roundings) * ROUNDING;
  for (size_t i = 0; i < got.size(); ++i) {
    const double wanted = one.wanted.v[i];
    const bool close = std::isnan(wanted) ? std::isnan(got[i]) : std::abs(got[i] - wanted) <= forgiven * one.wanted.size[i];
    if (got[i] == wanted || close) continue;
    must(false, "number " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " + std::to_string(wanted));
  }
  constexpr int64_t WAYS[][2] = {{2, 0}, {3, 0}, {1, 1}, {3, 1}, {2, 2}};
  for (const auto& [threads, images] : WAYS) {
    Output again;
    must(one.net.run(program.get(), threads, images, again) == NMFX_OK, "the same by threads and passes");
    must(alike(values_of(*again), got),
         "the same bit for bit with " + std::to_string(threads) + " threads and passes of " + std::to_string(images));
  }
}

const std::vector<Case>& samples() {  // one and more of every operator
  static const std::vector<Case> all = [] {
    std::vector<Case> made;
    for (int code = CONV; code <= LAST; ++code) {
      for (int64_t number = 2; number < (code >= LANES_CONV ? 12 : 6); ++number) made.push_back(drawn(Code(code), number));
    }
    return made;
  }();
  return all;
}

void refuses_programs_cut_short() {
  for (const Case& one : samples()) {
    const Numbers whole = one.net.numbers();
    for (size_t length = 0; length < whole.size(); ++length) {
      const Program program = one.net.program(Numbers(whole.begin(), whole.begin() + length));
      Output out;
      must(program && one.net.run(program.get(), 2, 0, out) == NMFX_REFUSED && !out, "a refusal of a program cut short");
    }
    Numbers longer = whole;
    longer.push_back(0);
    Output out;
    must(one.net.run(one.net.program(longer).get(), 1, 0, out) == NMFX_REFUSED, "a refusal of a number too many");
    longer = whole;
    longer[1 + one.net.inputs.size() + 2] = 1000;  // the code of the first step
    must(one.net.run(one.net.program(longer).get(), 1, 0, out) == NMFX_REFUSED, "a refusal of another version's operator");
  }
}

void survives_changes(int64_t rounds, int64_t first) {
  largest = size_t(1) << 22;
  constexpr int64_t BAD[] = {INT64_MIN, -(1ll << 31), -2,        -1,         0,          1,          2,
                             3,         5,            8,         17,         64,         257,        1000,
                             INT32_MAX, 1ll << 31,    1ll << 40, 1ll << 62, INT64_MAX};
  int64_t statuses[3]{};
  for (int64_t round = first; round < first + rounds; ++round) {
    running = "changes, case " + std::to_string(round);
    Draw draw(100, round);
    Net net = samples()[draw.below(samples().size())].net;
    Numbers numbers = net.numbers();
    const auto other = [&](int64_t old) {
      const int64_t next = old == INT64_MAX || (old > INT64_MIN && draw.odds(2)) ? old - 1 : old + 1;
      return draw.odds(3) ? next : BAD[draw.below(std::size(BAD))];
    };
    for (int64_t k = draw.below(3); k >= 0; --k) {
      Array* array = draw.odds(3) ? &net.inputs[draw.below(net.inputs.size())] : nullptr;
      if (!net.constants.empty() && draw.odds(2)) array = &net.constants[draw.below(net.constants.size())];
      if (!array) {
        int64_t& one = numbers[draw.below(numbers.size())];
        one = draw.odds(8) ? numbers[draw.below(numbers.size())] : other(one);
      } else if (array->code < 2 && !array->bytes.empty() && draw.odds(2)) {  // an index
        const size_t at = draw.below(array->bytes.size() * 8 / array->width) * array->width / 8;
        int32_t value = 0;
        std::memcpy(&value, array->bytes.data() + at, array->width / 8);
        value = static_cast<int32_t>(other(value));
        std::memcpy(array->bytes.data() + at, &value, array->width / 8);
      } else if (!array->shape.empty()) {  // sizes that its memory has room for
        const int64_t d = draw.below(array->shape.size());
        if (draw.odds(4)) array->shape.erase(array->shape.begin() + d), array->strides.clear();
        else array->shape[d] = draw.below(array->shape[d] + 1);
      }
    }
    const Program program = net.program(numbers);
    Output out;
    if (program) ++statuses[net.run(program.get(), 1 + draw.below(3), draw.below(2), out)];
    if (out) values_of(*out);
  }
  largest = size_t(1) << 28;
  must(rounds < 100 || (statuses[NMFX_OK] && statuses[NMFX_REFUSED]), "changes of both kinds");
}

void survives_without_memory() {
  for (const Case& one : samples()) {
    std::thread([&] {  // whose scratch memory is all new
      const std::vector<DLTensor> given = views(one.net.inputs), constants = views(one.net.constants);
      const Numbers numbers = one.net.numbers();
      for (int64_t number = 0;; ++number) {
        nmfx_status status = NMFX_NO_MEMORY;
        DLManagedTensor* made = nullptr;
        remaining = number;
        nmfx_program* program = nmfx_program_new(numbers.data(), numbers.size(), constants.data(), constants.size());
        if (program) status = nmfx_program_run(program, given.data(), given.size(), 1, 1 + number % 2, &made, 1);
        const bool ran_out = remaining.exchange(INT64_MAX) < 0;
        const Output out(made);
        nmfx_program_free(program);
        must(status == (ran_out ? NMFX_NO_MEMORY : NMFX_OK), "a status that says whether there was memory");
        if (!ran_out) return;
      }
    }).join();
  }
}

void refuses_what_is_not_there() {
  const Case one = drawn(AVERAGE, 2);
  const Numbers numbers = one.net.numbers();
  const Program program = one.net.program(numbers);
  DLTensor x = one.net.inputs[0].view();
  DLManagedTensor* out = nullptr;
  const auto refused = [&](nmfx_status status) { must(status == NMFX_REFUSED && !out && *nmfx_error(), "a refusal"); };
  must(!nmfx_program_new(nullptr, 3, nullptr, 0) && !nmfx_program_new(numbers.data(), -1, nullptr, 0) &&
           !nmfx_program_new(numbers.data(), INT64_MAX, nullptr, 0) && !nmfx_program_new(numbers.data(), 3, nullptr, 1) &&
           !nmfx_program_new(numbers.data(), 3, &x, -1), "no such program");
  refused(nmfx_program_run(nullptr, &x, 1, 0, 1, &out, 1));
  refused(nmfx_program_run(program.get(), nullptr, 1, 0, 1, &out, 1));
  for (const int64_t count : {-1, 0}) refused(nmfx_program_run(program.get(), &x, count, 0, 1, &out, 1));
  for (const int64_t threads : {int64_t(-1), int64_t(0), int64_t(4097), INT64_MAX}) {
    refused(nmfx_program_run(program.get(), &x, 1, 0, threads, &out, 1));
  }
  refused(nmfx_program_run(program.get(), &x, 1, -1, 1, &out, 1));
  refused(nmfx_program_run(program.get(), &x, 1, 0, 1, nullptr, 1));
  for (const int64_t count : {-1, 0, 2}) refused(nmfx_program_run(program.get(), &x, 1, 0, 1, &out, count));
  const auto wrong = [&](const std::function<void(DLTensor&, int64_t*)>& change) {
    DLTensor changed = x;
    Numbers shape = one.net.inputs[0].shape;
    changed.shape = shape.data();
    change(changed, shape.data());
    refused(nmfx_program_run(program.get(), &changed, 1, 0, 1, &out, 1));
    must(!nmfx_program_new(numbers.data(), numbers.size(), &changed, 1) || changed.ndim < 4, "no such constant");
  };
  int64_t back[] = {-1, 1, 1, 1}, far[] = {1ll << 50, 1, 1, 1};
  wrong([](DLTensor& t, int64_t*) { t.data = nullptr; });
  wrong([](DLTensor& t, int64_t*) { t.shape = nullptr; });
  wrong([](DLTensor& t, int64_t*) { t.device.device_type = 2; });
  wrong([](DLTensor& t, int64_t*) { t.dtype.bits = 64; });
  wrong([](DLTensor& t, int64_t*) { t.dtype = {0, 24, 1}; });
  wrong([](DLTensor& t, int64_t*) { t.dtype.lanes = 4; });
  wrong([](DLTensor& t, int64_t*) { t.ndim = 9; });
  wrong([](DLTensor& t, int64_t*) { t.ndim = -1; });
  wrong([](DLTensor& t, int64_t*) { t.byte_offset = 2; });
  wrong([](DLTensor&, int64_t* shape) { shape[1] = -1; });
  wrong([](DLTensor&, int64_t* shape) { shape[0] = shape[1] = 1ll << 32; });
  wrong([&](DLTensor& t, int64_t*) { t.strides = back; });
  wrong([&](DLTensor& t, int64_t* shape) { t.strides = far, shape[0] = 2; });
  // Rows so long, and so many, that their tiles cannot be counted.
  const int64_t side = 1 << 20;
  Net wide;
  const int64_t one_pixel = wide.input({{1, 1, 1, 1}, Floats{1}}), values = wide.constant(line(Floats{1}));
  std::vector<int32_t> pointers(side / 65536 + 1, 1);
  pointers[0] = 0;
  const int64_t columns = wide.constant(line(std::vector<int16_t>{0})), rising = wide.constant(line(pointers));
  wide.add(CONV, {one_pixel, values, columns, rising, -1, -1, 0, 1, side, 2, 1, side, 2, 1, 1, 2, side / 2, side / 2,
                  2, 1, 1, 1, bits(-INF), bits(INF), 65536, 8}, true);
  Output none;
  refused(wide.run(wide.program(wide.numbers()).get(), 2, 0, none));
  nmfx_program_free(nullptr);
  for (int code = CONV; code <= LAST; ++code) must(nmfx_operator_name(code) == std::string(CODES[code]), "names");
  must(!nmfx_operator_name(-1) && !nmfx_operator_name(LAST + 1) && nmfx_version() == NMFX_VERSION, "a version");
}

// One constant can be an index and the offsets of taps: what was found of it as one does not hold for the other.
void reads_a_constant_for_what_it_is() {
  const int64_t lanes = nmfx_vector_length();
  Layout x(lanes, 4, true, 2, 0, 0);
  Net net;
  const int64_t given = net.input({{1, 1, lanes, 4}, Floats(lanes * 4)}), index = net.constant(x.of_plain(1, lanes, 4));
  const int64_t far = net.constant({{1, 1}, std::vector<int32_t>{-(1 << 30)}});
  const int64_t laid = net.add(REARRANGE, {given, index, 2, x.vectors, lanes, 0});
  net.add(REARRANGE, {laid, far, 2, 1, 1, 1});
  const Numbers own{0, -1, -1, far, -1, -1, 1}, stride{1, 1, 2, 0, 0}, after{0, -1, bits(-INF), bits(INF), 0};
  net.add(LANES_CHANNEL, joined({{laid}, x.numbers(), own, stride, x.numbers(), after}), true);
  Output out;
  must(net.run(net.program(net.numbers()).get(), 1, 0, out) == NMFX_REFUSED, "windows within what they read");
}

// Outputs are the caller's, whatever becomes of programs, inputs and threads.
void leaves_outputs_that_stay() {
  for (size_t i = 0; i < samples().size() + 1; ++i) {
    auto one = std::make_unique<Case>(samples()[std::min(i, samples().size() - 1)]);
    Floats wanted;
    if (i == samples().size()) {  // an input by itself
      one->net = Net();
      one->net.input({{2, 3}, Floats{1, 2, 3, 4, 5, 6}});
    }
    Output out, other;
    std::thread([&] {
      Program program = one->net.program(one->net.numbers());
      must(one->net.run(program.get(), 2, 0, out) == NMFX_OK && one->net.run(program.get(), 2, 0, other) == NMFX_OK, "outputs");
      wanted = values_of(*out);
      for (const Array& input : one->net.inputs) {
        const auto* data = static_cast<const char*>(out->dl_tensor.data);
        must(data < input.bytes.data() || data >= input.bytes.data() + input.bytes.size(), "a new tensor");
      }
      std::memset(other->dl_tensor.data, 1, values_of(*other).size() * sizeof(float));
      other.reset();
    }).join();
    one.reset();
    must(alike(values_of(*out), wanted), "outputs that stay");
  }
}

void runs_on_many_threads_at_once(int64_t rounds) {
  std::vector<Program> programs;
  std::vector<Floats> wanted;
  for (const Case& one : samples()) {
    programs.push_back(one.net.program(one.net.numbers()));
    Output out;
    must(one.net.run(programs.back().get(), 1, 0, out) == NMFX_OK, "a program that runs");
    wanted.push_back(values_of(*out));
  }
  std::vector<std::thread> all;
  for (int64_t thread = 0; thread < 4; ++thread) {
    all.emplace_back([&, thread] {
      for (size_t k = 0; k < rounds * programs.size(); ++k) {  // two of the threads run the same
        const size_t i = (k + thread / 2 * 7) % programs.size();
        Output out;
        must(samples()[i].net.run(programs[i].get(), 1 + thread, k % 2, out) == NMFX_OK, "a program that runs beside others");
        must(alike(values_of(*out), wanted[i]), "the same beside others");
      }
    });
  }
  for (std::thread& one : all) one.join();
}

thread_local int omp_number = 0;
void parallel(void (*work)(void*), void* data, unsigned, unsigned) {  // of an OpenMP that has two threads, whatever is asked
  std::thread other([&] { omp_number = 1, work(data); });
  work(data);
  other.join();
}

}  // namespace

int main(int count, char** given) {
  if (!nmfx_supported()) return std::puts("skipped: this processor cannot run this variant"), 77;
  const int64_t cases = count > 1 ? std::atoll(given[1]) : 200, first = count > 2 ? std::atoll(given[2]) : 0;
  for (int code = CONV; code <= LAST; ++code) {
    for (int64_t number = first; number < first + cases; ++number) {
      running = std::string(CODES[code]) + ", case " + std::to_string(number);
      gives_what_is_wanted(Code(code), number);
    }
    std::printf("%s: %lld cases\n", CODES[code], static_cast<long long>(cases));
    std::fflush(stdout);
  }
  const auto test = [](const char* name, const auto& function) {
    running = name;
    function();
    std::puts(name);
    std::fflush(stdout);
  };
  test("refuses what is not there", refuses_what_is_not_there);
  test("refuses programs cut short", refuses_programs_cut_short);
  test("reads a constant for what it is", reads_a_constant_for_what_it_is);
  test("outputs stay", leaves_outputs_that_stay);
  if (MEMORY_CAN_RUN_OUT) {
    test("survives without memory", survives_without_memory);
    test("survives changes", [&] { survives_changes(20 * cases, first); });
  }
  test("runs on many threads at once", [&] { runs_on_many_threads_at_once(1 + cases / 50); });
  nmfx_use_openmp(parallel, [] { return omp_number; }, [] { return 2; });
  test("shares the threads of an OpenMP", [&] { runs_on_many_threads_at_once(1); });
  nmfx_use_openmp(nullptr, nullptr, nullptr);
  test("and its own again", [&] { runs_on_many_threads_at_once(1); });
  return 0;
}
