// Tests of csrc/cpu/vector.h as compiled for one instruction set: the error bounds that it states,
// and its loads, stores and shuffles. Exits with 77 where the processor lacks the set.
#include "../../csrc/cpu/vector.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace mmixer::cpu::MMIXER_ISA;

int failures = 0;

void check(bool ok, const char* what, double at = 0) {
  if (!ok && ++failures <= 30) std::printf("FAILED: %s, at %.9g\n", what, at);
}

// Whether the bits are equal, or both are NaN.
template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Every 1009th float, and all floats near the points where a function changes its course.
std::vector<float> interesting_floats() {
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 1009) x.push_back(from_bits(bits));
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> points = {0, std::numeric_limits<float>::min(), 1, 10, 20, 87, 88, infinity};
  for (int n = 0; n < 128; n++)
    for (double multiple : {n * 0.5, n * 0.5 + 0.25}) points.push_back(multiple * std::log(2.));
  for (float point : points) {
    uint32_t bits;
    std::memcpy(&bits, &point, sizeof bits);
    for (int64_t i = std::max<int64_t>(0, int64_t(bits) - 1000); i < int64_t(bits) + 1000; i++)
      for (uint32_t sign : {0u, 1u << 31}) x.push_back(from_bits(uint32_t(i) | sign));
  }
  while (x.size() % lanes<float> != 0) x.push_back(0);
  return x;
}

// The largest of some errors, and where it was.
struct Largest {
  double error = 0, at = 0;

  void add(double candidate, double x) {
    if (!(candidate <= error)) error = candidate, at = x;
  }
  void check_below(double bound, const char* what) const {
    std::printf("  %-48s %.3g at %.9g\n", what, error, at);
    check(error < bound, what, at);
  }
};

double relative(double y, double exact) { return y == exact ? 0 : std::abs((y - exact) / exact); }

template <class T>
T exact_sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

void check_float_functions() {
  using V = Vector<float>;
  volatile float end = 87;  // a compiler's own exp(87) may be rounded otherwise
  const float exp_low = exp(broadcast<float>(-end))[0], exp_high = exp(broadcast<float>(end))[0];
  Largest of_exp, of_sigmoid, of_low_sigmoid, of_tanh, of_odd, of_rest, of_small_rest;
  const std::vector<float> all = interesting_floats();
  for (size_t first = 0; first < all.size(); first += lanes<float>) {
    const V x = load(&all[first]), e = exp(x), s = sigmoid(x), t = tanh(x), minus_t = tanh(-x);
    const ScaledExp scaled = scaled_exp(x, -87.f, 87.f);
    for (int i = 0; i < lanes<float>; i++) {
      const double value = x[i];
      if (std::isnan(x[i])) {
        check(std::isnan(e[i]) && std::isnan(s[i]) && std::isnan(t[i]), "NaN gives NaN");
        continue;
      }
      check(s[i] >= 0 && s[i] <= 1, "sigmoid in [0, 1]", value);
      check(t[i] >= -1 && t[i] <= 1, "tanh in [-1, 1]", value);
      of_tanh.add(relative(t[i], std::tanh(value)), value);
      of_odd.add(relative(minus_t[i], -t[i]), value);
      if (value < -87)
        of_low_sigmoid.add(std::abs(s[i] - exact_sigmoid(value)), value);
      else
        of_sigmoid.add(relative(s[i], exact_sigmoid(value)), value);
      if (std::abs(value) > 87) {
        check(same(e[i], value < 0 ? exp_low : exp_high), "exp is clamped", value);
        continue;
      }
      of_exp.add(relative(e[i], std::exp(value)), value);
      int n;
      check(std::frexp(scaled.power[i], &n) == 0.5f, "the power is one of 2", value);
      const long double rest = std::expm1(value - (n - 1) * std::log(2.0L));
      of_rest.add(std::abs(scaled.rest[i] - rest), value);
      if (n == 1) of_small_rest.add(relative(scaled.rest[i], double(rest)), value);
    }
  }
  std::printf("float, %zu values\n", all.size());
  of_rest.check_below(5e-8, "scaled_exp, rest: absolute");
  of_small_rest.check_below(1e-7, "scaled_exp, rest where power is 1: relative");
  of_exp.check_below(1e-7, "exp in [-87, 87]: relative");
  of_sigmoid.check_below(2e-7, "sigmoid from -87 on: relative");
  of_low_sigmoid.check_below(2e-38, "sigmoid below -87: absolute");
  of_tanh.check_below(2e-7, "tanh: relative");
  of_odd.check_below(4e-7, "tanh, odd: relative");

  const float infinity = std::numeric_limits<float>::infinity();
  check(sigmoid(broadcast(infinity))[0] == 1, "sigmoid(inf)");
  check(sigmoid(broadcast(-infinity))[0] < 2e-38f, "sigmoid(-inf)");
  check(tanh(broadcast(infinity))[0] == 1 && tanh(broadcast(-infinity))[0] == -1, "tanh(inf)");
}

void check_double_functions() {
  std::mt19937_64 random(0);
  Largest of_sigmoid, of_tanh;
  const auto add = [&](double value) {
    const Vector<double> x = broadcast(value);
    const double s = sigmoid(x)[lanes<double> - 1], t = tanh(x)[lanes<double> - 1];
    if (std::isnan(value)) return check(std::isnan(s) && std::isnan(t), "NaN gives NaN");
    check(s >= 0 && s <= 1, "sigmoid in [0, 1]", value);
    check(t >= -1 && t <= 1 && t == -tanh(-x)[0], "tanh is odd and in [-1, 1]", value);
    if (value < -709)
      check(s < 1e-307, "sigmoid below -709", value);
    else
      of_sigmoid.add(std::abs(double(s / exact_sigmoid<long double>(value) - 1)), value);
    if (value != 0) of_tanh.add(std::abs(double(t / std::tanh((long double)value) - 1)), value);
  };
  for (int i = 0; i < 100000; i++) {
    const uint64_t bits = random();
    double x;
    std::memcpy(&x, &bits, sizeof x);
    add(x);
    add(std::uniform_real_distribution<double>(-45, 45)(random));
    add(std::uniform_real_distribution<double>(-720, 20)(random));
  }
  const double infinity = std::numeric_limits<double>::infinity();
  for (double x : {0., -0., infinity, -infinity, std::nan("")}) add(x);
  std::printf("double\n");
  of_sigmoid.check_below(5e-16, "sigmoid from -709 on: relative");
  of_tanh.check_below(5e-16, "tanh: relative");
}

// Values that give another sum in another order of addition.
template <class T>
Vector<T> random_vector(std::mt19937& random) {
  Vector<T> v;
  for (int i = 0; i < lanes<T>; i++)
    v[i] = std::ldexp(std::uniform_real_distribution<T>(-1, 1)(random), int(random() % 20));
  return v;
}

template <class T>
void check_lanes() {
  constexpr int L = lanes<T>;
  std::mt19937 random(0);
  for (int round = 0; round < 1000; round++) {
    Vector<T> v[4];
    T total[4];
    for (Vector<T>& x : v) x = random_vector<T>(random);
    sum_four<T>(v, total);
    for (int i = 0; i < 4; i++) {
      T part[L];
      store(part, v[i]);
      for (int half = L / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) part[j] += part[j + half];
      check(same(sum<T>(v[i]), part[0]), "sum", i);
      check(same(total[i], part[0]), "sum_four", i);
    }
  }

  Vector<T> rows[L];
  for (int i = 0; i < L; i++)
    for (int j = 0; j < L; j++) rows[i][j] = T(i * L + j);
  transpose<T>(rows);
  for (int i = 0; i < L; i++)
    for (int j = 0; j < L; j++) check(rows[i][j] == j * L + i, "transpose", i * L + j);

  for (T x : {T(1.5), T(-0.), std::numeric_limits<T>::infinity(), T(std::nan(""))})
    for (int j = 0; j < L; j++) check(same(broadcast(x)[j], x), "broadcast", x);

  const Vector<T> v = random_vector<T>(random);
  for (int count = -1; count <= L + 1; count++) {
    for (int j = 0; j < L; j++) {
      check(same(keep_from<T>(v, count)[j], j >= count ? v[j] : 0), "keep_from", count);
      check(same(keep_below<T>(v, count)[j], j < count ? v[j] : 0), "keep_below", count);
    }
    if (count < 0) continue;
    const std::unique_ptr<T[]> memory(new T[count]);  // no more, for AddressSanitizer
    for (int j = 0; j < count; j++) memory[j] = T(j + 1);
    const Vector<T> loaded = load(memory.get(), count);
    for (int j = 0; j < L; j++) check(loaded[j] == (j < count ? j + 1 : 0), "load", count);
    T target[L + 2], expected[L + 2];
    std::fill_n(target, L + 2, T(-1));
    std::fill_n(expected, L + 2, T(-1));
    store(target, v, count);
    for (int j = 0; j < std::min(count, L); j++) expected[j] = v[j];
    for (int j = 0; j < L + 2; j++) check(target[j] == expected[j], "store", count);
  }
}

void check_bfloat16() {
  constexpr int L = lanes<float>;
  for (uint32_t first = 0; first < 1 << 16; first += 251)
    for (int count = 0; count <= L + 1; count++) {
      const std::unique_ptr<bfloat16[]> memory(new bfloat16[count]);
      for (int j = 0; j < count; j++) memory[j].bits = uint16_t(first + j);
      const Vector<float> loaded = load(memory.get(), count);
      for (int j = 0; j < L; j++)
        check(same(loaded[j], j < count ? from_bits(uint32_t(memory[j].bits) << 16) : 0),
              "load of bfloat16", count);
      if (count == L)
        for (int j = 0; j < L; j++)
          check(same(load(memory.get())[j], loaded[j]), "whole load of bfloat16", first);
    }
}

void check_constants() {
  for (int value = 1; value <= 8; value++)
    with_constant<8>(value, [&](auto constant) {
      check(decltype(constant)::value == value, "with_constant", value);
    });
}

__attribute__((noinline)) int check_all() {
  check_float_functions();
  check_double_functions();
  check_lanes<float>();
  check_lanes<double>();
  check_bfloat16();
  check_constants();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

bool has_instructions() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace

int main() {
  if (has_instructions()) return check_all();
  std::printf("this processor lacks the instruction set\n");
  return 77;
}
