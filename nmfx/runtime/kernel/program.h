// What a program says, one number after the other (nmfx/runtime/program.py writes it), read as the arguments of operators.

#pragma once

#include <bit>
#include <tuple>
#include <vector>

#include "lanes_operators.h"
#include "quantized.h"

namespace {

struct Program {
  const int64_t *at, *end;
  const std::vector<Tensor>& constants;
  std::vector<Tensor>& slots;
  size_t inputs = slots.size();

  int64_t number() {
    check(at < end, "a program that is whole");
    return *at++;
  }
  Sizes numbers() {
    const int64_t count = number();
    check(0 <= count && count <= end - at, "a program that is whole");
    at += count;
    return {at - count, static_cast<size_t>(count)};
  }
  const Tensor& in(const std::vector<Tensor>& all, int64_t place) {
    check(0 <= place && place < static_cast<int64_t>(all.size()) && all[place].defined(), "places that a program has filled");
    return all[place];
  }
  const Tensor& slot(int64_t place) { return in(slots, place); }
  // Inputs as the program is for: of each its sizes, those below zero free; none where any will do.
  void check_inputs() {
    check(number() == static_cast<int64_t>(inputs), "as many inputs as the program has");
    for (size_t i = 0; i < inputs; ++i) {
      const Sizes wanted = numbers(), found = slots[i].sizes();
      bool fits = wanted.empty() || wanted.size() == found.size();
      for (size_t d = 0; fits && d < wanted.size(); ++d) fits = wanted[d] < 0 || wanted[d] == found[d];
      check(fits, "an input of the sizes ", wanted, " that the chain is for (-1 are free), got ", found);
    }
  }

  // A tensor: its slot, or below -1 a constant; -1 stands for none where there may be none.
  void read(Tensor& one) {
    const int64_t place = number();
    one = place < 0 ? in(constants, -2 - place) : slot(place);
  }
  void read(std::optional<Tensor>& one) {
    check(at < end, "a program that is whole");
    if (*at == -1) {
      one = std::nullopt;
      ++at;
    } else {
      read(one.emplace());
    }
  }
  void read(int64_t& one) { one = number(); }
  void read(bool& one) { one = number() != 0; }
  void read(double& one) { one = std::bit_cast<double>(number()); }
  void read(Sizes& several) { several = numbers(); }
  // Whether to write over the slot named at `place`, which must be the chain's own.
  bool over(const int64_t* place) {
    const bool writes = number() != 0;
    check(!writes || *place >= static_cast<int64_t>(inputs), "inputs that stay as they are");
    return writes;
  }
  void read(Residual& one) {
    const int64_t* place = at;
    read(one.tensor);
    one.over = over(place);
  }
  void read(Lanes& one) {
    for (int64_t* count : {&one.rows, &one.width, &one.pitch, &one.length, &one.before, &one.vectors, &one.strips, &one.left,
                           &one.right}) {
      *count = number();
    }
  }
  void read(std::optional<Lanes>& one) {
    if (number()) read(one.emplace());
  }
  void read(Planes& one) { one = {number(), number(), number(), number(), number(), number()}; }
  void read(Planed& one) {
    Tensor picture;
    Planes planes;
    read(picture);
    read(planes);
    one = planed(picture, planes);
  }
  void read(std::optional<Added>& one) {
    if (number()) {
      read(one.emplace().picture);
      read(one->scale);
    }
  }
  void read(Stride& one) { one = {number(), number(), numbers()}; }
  void read(Laid& one) {
    Tensor picture;
    Lanes lanes;
    read(picture);
    read(lanes);
    one = laid(picture, lanes);
  }
  void read(After& one) {
    const bool added = number() != 0;
    const int64_t* place = at;
    if (added) read(one.residual.emplace());
    read(one.mask);
    read(one.low);
    read(one.high);
    one.over = over(place);
  }

  // An operator with its arguments, which the program has in their order.
  template <class... A>
  Tensor call(Tensor (*function)(A...)) {
    std::tuple<std::decay_t<A>...> arguments;
    std::apply([&](auto&... each) { (read(each), ...); }, arguments);
    return std::apply(function, arguments);
  }
};

}  // namespace
