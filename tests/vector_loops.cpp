// The loops of csrc/vector.inc against plain ones, for every instruction set this processor runs.
// Needs no torch: `make cross` runs it as another compiler builds it, and for another processor.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/vector.h"

namespace {

using mcpo::Vector;

constexpr double kEps = std::numeric_limits<float>::epsilon();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// One with a payload, which arithmetic on the bits would spoil.
const float kNan = [] {
  const uint32_t bits = 0x7fc001ffu;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}();

int failures = 0;
std::mt19937 generator(0);

// `band` is absolute. A NaN must meet a NaN.
void expect(const char* what, double actual, double exact, double band) {
  if (actual == exact || (std::isnan(actual) && std::isnan(exact))) return;
  if (std::isfinite(exact) && std::fabs(actual - exact) <= band) return;
  if (++failures <= 20)
    std::printf("  %s: %.9g, not %.9g within %.3g\n", what, actual, exact, band);
}

std::vector<float> normal(int64_t count, float deviation) {
  std::normal_distribution<float> draw(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = draw(generator);
  return values;
}

void test_transpose(const Vector& loops) {
  for (int64_t rows : {1, 15, 16, 17, 48})
    for (int64_t columns : {1, 16, 31, 64}) {
      const int64_t stride = columns + 3, to_stride = rows + 5;
      std::vector<uint32_t> from(rows * stride), to(columns * to_stride, 7u);
      for (uint32_t& each : from) each = generator();
      loops.transpose(from.data(), 4 * stride, to.data(), to_stride, rows, columns);
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < to_stride; ++r)
          expect("transpose", to[c * to_stride + r], r < rows ? from[r * stride + c] : 7u, 0);
    }
}

void test_interleave(const Vector& loops) {
  for (int64_t count : {1, 15, 16, 33}) {
    std::vector<uint16_t> even(count), odd(count);
    std::vector<uint32_t> to(count + 1, 7u);
    for (int64_t i = 0; i < count; ++i) even[i] = generator(), odd[i] = generator();
    loops.interleave(even.data(), odd.data(), to.data(), count);
    for (int64_t i = 0; i < count; ++i) expect("interleave", to[i], even[i] + 65536.0 * odd[i], 0);
    expect("interleave, past the end", to[count], 7u, 0);
  }
}

// Of two neighbours in bfloat16 the nearer, of two as near the even one.
void test_round(const Vector& loops) {
  std::vector<float> from(4096 + 16, 0.0f);
  for (int64_t i = 0; i < 4096; ++i) {
    // Every third lies half way, the rest anywhere; subnormal and infinite results come up too.
    const uint32_t bits = i % 3 ? generator() : (generator() & 0xffff0000u) | 0x8000u;
    std::memcpy(&from[i], &bits, 4);
  }
  from[4096] = kInfinity, from[4097] = -kInfinity, from[4098] = kNan;
  std::vector<uint16_t> to(from.size());
  loops.round(from.data(), to.data(), from.size());
  for (size_t i = 0; i < from.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], 4);
    const uint32_t below = bits >> 16, rest = bits & 0xffffu;
    const uint32_t up = rest > 0x8000u || (rest == 0x8000u && (below & 1u));
    expect("round", to[i], std::isnan(from[i]) ? 0x7fc0u : below + up, 0);
  }
}

// tanh to 4 units in the last place, and one each for the sum, the product and the quotient.
void test_finish(const Vector& loops) {
  const int64_t count = 4096;
  std::vector<float> z = normal(count, 20.0f);
  const std::vector<float> bias = normal(count, 1.0f);
  z[0] = kNan, z[1] = kInfinity, z[2] = -kInfinity, z[3] = 0.0f;
  for (float cap : {0.0f, 5.0f})
    for (const float* shift : {static_cast<const float*>(nullptr), bias.data()}) {
      std::vector<float> got = z;
      loops.finish(got.data(), shift, count, 0.5f, cap);
      for (int64_t i = 0; i < count; ++i) {
        const double sum = static_cast<double>(z[i]) + (shift ? shift[i] : 0.0f);
        const double exact = cap > 0 ? cap * std::tanh(0.5 * sum / cap) : 0.5 * sum;
        expect("finish", got[i], exact, 8 * kEps * std::fabs(exact));
      }
    }
}

// An exponential is off by 2 units in the last place and by the rounding of its argument, and is 0
// below exp(-87.3).
double exponential_band(double exponent) {
  return exponent < -87.3 ? std::exp(-87.3) : (2 + std::fabs(exponent)) * kEps * std::exp(exponent);
}

void test_fold(const Vector& loops) {
  const int64_t count = 64;
  for (float deviation : {0.1f, 10.0f, 1000.0f}) {
    float maximum = -kInfinity, sum = 0.0f;
    double largest = -kInfinity, exact = 0.0, band = 0.0;
    for (int64_t tile = 0; tile < 20; ++tile) {
      // The second tile bans all, the third some.
      std::vector<float> z = normal(count, deviation);
      if (tile == 1) z.assign(count, -kInfinity);
      if (tile == 2) z[5] = z[63] = -kInfinity;
      double top = largest;
      for (float value : z) top = std::fmax(top, value);
      exact *= std::exp(largest - top), band *= std::exp(largest - top);
      double exact_added = 0.0, band_added = 0.0;
      for (float value : z)
        if (value != -kInfinity)
          exact_added += std::exp(value - top), band_added += exponential_band(value - top);
      exact += exact_added, band += band_added, largest = top;
      const float added = loops.fold(z.data(), count, &maximum, &sum);
      expect("fold, maximum", maximum, largest, 0);
      expect("fold, added", added, exact_added, band_added + 8 * kEps * exact_added);
      // Every tile adds a few roundings of the sum, and one of its rescaling.
      expect("fold, sum", sum, exact, 4 * band + (tile + 1) * 16 * kEps * exact);
    }
  }
  std::vector<float> z(count, -kInfinity);
  float maximum = -kInfinity, sum = 0.0f;
  loops.fold(z.data(), count, &maximum, &sum);
  expect("fold of nothing, maximum", maximum, -kInfinity, 0);
  expect("fold of nothing, sum", sum, 0.0, 0);
  z[17] = kNan;
  loops.fold(z.data(), count, &maximum, &sum);
  expect("fold of a NaN", sum, kNan, 0);
}

void test_dlogits(const Vector& loops) {
  const int64_t count = 4096;
  std::vector<float> z = normal(count, 10.0f);
  for (float& value : z) value = std::fmin(std::fmax(value, -29.0f), 29.0f);
  z[0] = kNan;
  for (float cap : {0.0f, 30.0f}) {
    std::vector<float> got = z;
    const float lse = 31.25f, grad = -0.75f, scale = 1.5f;
    loops.dlogits(got.data(), count, lse, grad, scale, cap);
    for (int64_t i = 0; i < count; ++i) {
      const double ratio = cap > 0 ? static_cast<double>(z[i]) / cap : 0.0;
      const double exponent = static_cast<double>(z[i]) - lse;
      const double exact = -grad * std::exp(exponent) * (1 - ratio * ratio) * scale;
      // 1 - ratio^2 is off by 2 roundings of 1 at most; four products follow.
      const double band = 2 * exponential_band(exponent) + 4 * kEps * std::exp(exponent);
      expect("dlogits", got[i], exact, band);
    }
  }
}

void test_multiply(const Vector& loops) {
  for (int64_t rows : {1, 5, 6, 13})
    for (int64_t columns : {16, 64, 80})
      for (int64_t inner : {1, 255, 600})
        for (bool add : {false, true}) {
          const int64_t a_stride = inner + 2, b_stride = columns + 16, c_stride = columns + 1;
          const std::vector<float> a = normal(rows * a_stride, 1.0f);
          const std::vector<float> b = normal(inner * b_stride, 1.0f);
          const std::vector<float> before = normal(rows * c_stride, 1.0f);
          std::vector<float> c = before;
          loops.multiply(rows, columns, inner, a.data(), a_stride, b.data(), b_stride, c.data(),
                         c_stride, add);
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              double exact = add ? before[i * c_stride + j] : 0.0, size = std::fabs(exact);
              for (int64_t k = 0; k < inner; ++k) {
                const double product = static_cast<double>(a[i * a_stride + k]) * b[k * b_stride + j];
                exact += product, size += std::fabs(product);
              }
              expect("multiply", c[i * c_stride + j], exact, (inner + 2) * kEps * size);
            }
            expect("multiply, past the end", c[i * c_stride + columns],
                   before[i * c_stride + columns], 0);
          }
        }
}

}  // namespace

int main() {
  for (const Vector* loops : mcpo::runnable()) {
    const int before = failures;
    for (auto test : {test_transpose, test_interleave, test_round, test_finish, test_fold,
                      test_dlogits, test_multiply})
      test(*loops);
    std::printf("%s loops: %s\n", loops->name, failures == before ? "as the plain ones" : "WRONG");
  }
  return failures ? 1 : 0;
}
