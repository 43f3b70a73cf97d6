// Pictures from plain to lanes, back, and from lanes to lanes.

#pragma once

#include "lanes_operators.h"

namespace {

// `index` is (strips, floats of a channel) of the output; it says where in a channel of the input each float is, with the strip
// it is in above that, or is negative for a zero. `sizes` are those of the output behind its channels: height and width of plain
// pictures, else vectors and VL; where the index is longer, there are several channels for each of the input's.
constexpr int32_t IN_STRIP = 1 << 22;

#ifdef __clang__
#define SCALAR
#else
#define SCALAR __attribute__((optimize("no-tree-vectorize")))  // a gather of sixteen lanes takes several times longer
#endif
SCALAR void pick(const float* from, const int32_t* places, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = places[k] < 0 ? 0.0f : from[places[k]];
}

// The last strip that an index names, and the last float within a strip; strips only where there are `several`.
Reach named_by(const Tensor& index, bool several) {
  return known->reach({&index}, {Known::INDEX, several}, [&] {
    Reach last{0, -1};
    const int32_t* places = index.const_data_ptr<int32_t>();
    for (int64_t k = 0; k < index.numel(); ++k) {
      if (places[k] < 0) continue;
      last.least = std::max<int64_t>(last.least, several ? places[k] / IN_STRIP : 0);
      last.most = std::max<int64_t>(last.most, several ? places[k] % IN_STRIP : places[k]);
    }
    return last;
  });
}

// Pictures that lie one behind the other, as strips.
Tensor one_strip(const Tensor& x) { return x.as({1, x.size(0), x.size(1), x.size(2), x.size(3)}); }

Tensor rearrange(const Tensor& input, const Tensor& index, Sizes sizes, bool plain) {
  check(packed_in_order(index, Type::INT) && index.dim() == 2 && index.size(0) > 0 && sizes.size() == 2 &&
            within(sizes, 1, LONGEST) && (!plain || index.size(0) == 1),
        "an index of int32");
  const Tensor x = input.dim() == 4 ? one_strip(pictures_of(input)) : input;
  check(x.dim() == 5 && sound(x, Type::FLOAT) && within(x.sizes().slice(2), 1, LONGEST) && x.size(0) > 0 && strips_in_order(x),
        "pictures or lanes of float32");
  const int64_t images = x.size(1), channels = x.size(2), strips = index.size(0), floats = index.size(1);
  const int64_t planes = floats / product({sizes[0], sizes[1]}), of_channel = product({x.size(3), x.size(4)});
  check(planes > 0 && planes * sizes[0] * sizes[1] == floats, "an index of whole planes");
  const Reach last = named_by(index, x.size(0) > 1);
  check(last.least < x.size(0) && last.most < of_channel, "an index into pictures of this size, got ", input.sizes());
  check((x.size(0) - 1) * x.stride(0) + of_channel <= INT32_MAX, "a batch that int32 can count");
  product({strips, images, channels, floats});
  Tensor y = plain ? output({images, channels * planes, sizes[0], sizes[1]})
                       : output_strips({strips, images, channels * planes, sizes[0], sizes[1]});
  const float* source = x.const_data_ptr<float>();
  float* target = y.mutable_data_ptr<float>();
  const int64_t from_strip = x.stride(0), from_channel = x.stride(2), to_strip = plain ? 0 : y.stride(0);
  std::vector<int32_t> places(index.const_data_ptr<int32_t>(), index.const_data_ptr<int32_t>() + index.numel());
  if (x.size(0) > 1) {
    for (int32_t& place : places) {
      if (place >= 0) place = static_cast<int32_t>(place / IN_STRIP * from_strip + place % IN_STRIP);
    }
  }
  parallel_for(0, strips * images * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item / (images * channels), channel = item % (images * channels);
      const float* from = source + channel * from_channel;
      pick(from, places.data() + strip * floats, floats, target + strip * to_strip + channel * floats);
    }
  });
  return y;
}

}  // namespace
