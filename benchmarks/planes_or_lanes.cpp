// Sparse fp32 products over pictures as lanes (every shift an aligned vector) and over planes with a halo (unaligned streams):
//   g++ -O3 -march=x86-64-v4 -o /tmp/planes_or_lanes benchmarks/planes_or_lanes.cpp && /tmp/planes_or_lanes
// The inner loop of both, one thread, at the shapes of ResNet-50's 1x1 and 3x3 convolutions under 2:16; the best of 30 rounds.

#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

constexpr int NV = 4;  // vectors of sums

struct Layer {
  int channels, side, taps;
  int kept() const { return channels * taps / 8; }
};

double seconds(const float* x, const std::vector<int>& offsets, const Layer& layer, int tiles, float* y) {
  const int kept = layer.kept();
  const std::vector<float> weights(size_t(layer.channels) * kept, 0.5f);
  double best = 1e9;
  for (int round = 0; round < 30; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int tile = 0; tile < tiles; ++tile) {
      for (int row = 0; row < layer.channels; ++row) {
        __m512 sums[NV] = {};
        for (int k = row * kept; k < (row + 1) * kept; ++k) {
          const __m512 weight = _mm512_set1_ps(weights[k]);
          const float* from = x + offsets[k] + tile * NV * 16;
          for (int i = 0; i < NV; ++i) sums[i] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(from + 16 * i), sums[i]);
        }
        for (int i = 0; i < NV; ++i) _mm512_store_ps(y + (size_t(row) * tiles + tile) * NV * 16 + 16 * i, sums[i]);
      }
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

int main() {
  for (const Layer layer : {Layer{64, 56, 1}, {64, 56, 9}, {128, 28, 1}, {128, 28, 9}, {256, 14, 1}, {256, 14, 9}, {512, 7, 1}, {512, 7, 9}}) {
    const int line = layer.side + 1, tiles = (layer.side * line + NV * 16 - 1) / (NV * 16), pitch = tiles * NV * 16 + 128;
    auto* x = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * (size_t(layer.channels) * pitch + 4096)));
    auto* y = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * (size_t(layer.channels) * pitch)));
    for (size_t i = 0; i < size_t(layer.channels) * pitch + 4096; ++i) x[i] = 1.0f;
    double rate[2];
    for (const bool planes : {false, true}) {
      std::mt19937 draw(1);
      std::vector<int> offsets;
      for (int k = 0; k < layer.channels * layer.kept(); ++k) {
        const int column = k % layer.kept() * 8 + static_cast<int>(draw() % 8), tap = layer.taps == 1 ? 4 : column % 9;
        const int down = tap / 3 - 1, right = tap % 3 - 1, shift = planes ? down * line + right : (down * 4 + right) * 16;
        offsets.push_back(2048 + column / layer.taps * pitch + shift);
      }
      rate[planes] = 1e-9 * layer.channels * layer.kept() * tiles * NV * 16 / seconds(x, offsets, layer, tiles, y);
    }
    std::printf("%d x %d, %d channels, %s: lanes %.1f, planes %.1f GMAC/s (%.2fx)\n", layer.side, layer.side, layer.channels,
                layer.taps == 1 ? "1x1" : "3x3", rate[0], rate[1], rate[1] / rate[0]);
    std::free(x), std::free(y);
  }
}
