// csrc/cpu/int8.h against plain loops over integers, to the bit, with every set that there is; and
// steps of the engine with int8 weights, for sanitizers: tests/test_quantized.py looks at their
// values. All memory is of exactly the size that the interface states.
#include "../../csrc/cpu/engine.h"
#include "../../csrc/cpu/int8.h"
#include "../../csrc/cpu/team.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

using namespace mmixer;
using namespace mmixer::cpu;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (!ok && ++failures <= 30) std::printf("FAILED: %s\n", what.c_str());
}

using Row = std::vector<float>;

// M rows and N rows of W, of K values each that lie `stride` apart.
struct Case {
  int64_t K, stride;
  std::vector<Row> rows;
  std::vector<int8_t> w;
  std::vector<float> weight_scale;
  int64_t N() const { return int64_t(weight_scale.size()); }
};

// The products as int8.h defines them.
std::vector<Row> reference(const Case& c) {
  std::vector<Row> results;
  for (const Row& row : c.rows) {
    float largest = 0;
    bool is_finite = true;
    for (float x : row) largest = std::max(largest, std::abs(x)), is_finite &= std::isfinite(x);
    const float factor = 127 / largest, scale = largest / 127;
    Row& result = results.emplace_back();
    for (int64_t n = 0; n < c.N(); n++) {
      int64_t sum = 0;
      for (int64_t k = 0; k < c.K && is_finite && std::isfinite(factor); k++) {
        const volatile float scaled = row[k] * factor;
        sum += int64_t(std::nearbyint(scaled)) * c.w[n * c.stride + k];
      }
      result.push_back(is_finite ? c.weight_scale[n] * scale * float(sum) : std::nanf(""));
    }
  }
  return results;
}

// The columns in the shares of `members`.
std::vector<Row> run(const Case& c, const Int8Kernels& kernels, int64_t members) {
  std::vector<std::vector<char>> quantized;
  std::vector<Row> results(c.rows.size(), Row(c.N(), -1));
  std::vector<const void*> rows;
  std::vector<float*> to;
  for (const Row& row : c.rows) {
    quantized.emplace_back(int8_row_bytes(c.K), char(0x5a));
    kernels.quantize(row.data(), c.K, quantized.back().data());
  }
  for (size_t m = 0; m < c.rows.size(); m++) {
    rows.push_back(quantized[m].data());
    to.push_back(results[m].data());
  }
  for (int64_t i = 0; i < members; i++)
    kernels.product(rows.data(), int64_t(rows.size()), c.w.data(), c.stride, c.K,
                    c.weight_scale.data(), c.N() * i / members, c.N() * (i + 1) / members,
                    to.data());
  return results;
}

bool same(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

void compare(const Case& c, const std::string& what) {
  const std::vector<Row> truth = reference(c);
  for (const Int8Set& set : int8_sets())
    for (int64_t members : {1, 3}) {
      const std::vector<Row> results = run(c, *set.kernels, members);
      for (size_t m = 0; m < truth.size(); m++)
        check(std::equal(truth[m].begin(), truth[m].end(), results[m].begin(), same),
              set.name + ": " + what + ", row " + std::to_string(m) +
                  ", K = " + std::to_string(c.K) + ", N = " + std::to_string(c.N()));
    }
}

Case drawn(int64_t K, int64_t N, int64_t gap, std::mt19937& random) {
  std::uniform_real_distribution<float> value(-1, 1);
  Case c{K, K + gap, {}, std::vector<int8_t>((N - 1) * (K + gap) + K), Row(N)};
  for (int8_t& w : c.w) w = int8_t(random());
  for (float& scale : c.weight_scale) scale = value(random);
  for (int m = 0; m < 2; m++) {
    Row& row = c.rows.emplace_back(K);
    for (float& x : row) x = value(random);
  }
  return c;
}

// Steps of G cells, of which some have their contexts' shares given, by teams of any size.
void check_steps(int64_t G, int64_t B, int64_t H, bool has_context, std::mt19937& random) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t D = 37, C = 70, rows = norm_rows(has_context), columns[] = {D, C, 2 * H, H, H, H};
  std::uniform_real_distribution<float> value(-1, 1);
  const auto drawn_row = [&](int64_t size) {
    Row row(size);
    for (float& x : row) x = value(random);
    return row;
  };
  std::vector<std::vector<int8_t>> matrices;
  std::vector<Row> inputs, contexts, norms, scales;
  for (int64_t g = 0; g < G; g++) {
    inputs.push_back(drawn_row(B * D));
    contexts.push_back(drawn_row(B * C));
    norms.push_back(drawn_row(2 * rows * H));
    scales.push_back(drawn_row(rows * H));
    for (int64_t width : columns) {
      matrices.emplace_back(H * width);
      for (int8_t& w : matrices.back()) w = int8_t(random());
    }
  }
  const Row hx = drawn_row(G * B * H);
  std::vector<Group> groups(G);
  Problem p{};
  p.groups = G, p.steps = 1, p.batch = B, p.hidden = H, p.has_context = has_context;
  p.dtype = p.norm_dtype = Dtype::float32, p.weight_dtype = Dtype::int8;
  p.eps = 1e-5, p.hx = hx.data(), p.hx_stride_group = B * H, p.hx_stride_sample = H;
  p.group = groups.data();
  for (int64_t g = 0; g < G; g++) {
    Group& group = groups[g];
    group.input = inputs[g].data(), group.input_stride_sample = group.input_size = D;
    if (has_context)
      group.context = contexts[g].data(), group.context_stride_sample = group.context_size = C;
    for (int gate = 0; gate < gates; gate++)
      if (has_gate(gate, has_context)) group.weight[gate] = matrices[g * gates + gate].data();
    group.norm_weight = norms[g].data(), group.norm_bias = norms[g].data() + rows * H;
    group.scale = scales[g].data();
  }
  const std::string what = "G = " + std::to_string(G) + ", B = " + std::to_string(B) +
                           ", H = " + std::to_string(H) + (has_context ? ", context" : "");
  for (const std::string& set : instruction_sets()) {
    use_instruction_set(set);
    Row alone;
    for (int threads : {1, 2, 4})
      for (bool is_shared : {false, true}) {
        if (is_shared && !has_context) continue;
        p.threads = threads;
        Row share(is_shared ? G * 2 * B * H : 0, nan), workspace(forward_workspace_size(p), nan);
        Row h_n(G * B * H, nan), scratch = workspace;
        if (is_shared) context_share(p, share.data(), scratch.data());
        for (int64_t g = 0; g < G; g++)
          groups[g].share = is_shared ? share.data() + g * 2 * B * H : nullptr;
        forward(p, {h_n.data(), B * H, 0, H, h_n.data()}, nullptr, workspace.data());
        for (Group& group : groups) group.share = nullptr;
        if (alone.empty()) alone = h_n;
        check(std::all_of(h_n.begin(), h_n.end(), [](float x) { return std::isfinite(x); }),
              set + ": not all states are finite, " + what);
        check(h_n == alone, set + ": " + std::to_string(threads) + " threads, " + what);
      }
  }
  use_instruction_set(instruction_sets().front());
}

}  // namespace

int main() {
  set_available_processors(4);  // teams of four members on any machine
  std::mt19937 random(0);
  check(&int8_in_use() == int8_sets().front().kernels, "the best set is not the default");
  for (int64_t K = 1; K <= 130; K++)
    for (int64_t N : {1, 7, 8, 19}) compare(drawn(K, N, K % 3 * K, random), "random values");

  // The largest products of one sign, and of two signs in turns.
  for (int64_t K : {31, 64, 133})
    for (int8_t w : {-128, -127, 127})
      for (float x : {1.f, -1.f}) {
        Case c = drawn(K, 9, 0, random);
        std::fill(c.w.begin(), c.w.end(), w);
        std::fill(c.rows[0].begin(), c.rows[0].end(), x);
        for (int64_t k = 0; k < K; k++) c.rows[1][k] = k / 2 % 2 ? x : -x;
        compare(c, "the largest products");
      }
  Case longest = drawn(int8_columns, 2, 0, random);
  std::fill_n(longest.w.begin(), int8_columns, int8_t(-128));
  std::fill_n(longest.w.begin() + int8_columns, int8_columns, int8_t(127));
  std::fill(longest.rows[0].begin(), longest.rows[0].end(), -3.f);
  compare(longest, "the largest sums");

  // Values half way between two integers, and as near to that as rounding lets them be.
  for (float largest : {127.f, 0.9f, 1.1f, 3.7e-5f, 2.3e30f}) {
    Case c = drawn(254, 8, 0, random);
    for (int64_t k = 0; k < 254; k++)
      c.rows[0][k] = (float(k / 2) + 0.5f) * largest / 127 * (k % 2 ? 1 : -1);
    c.rows[0][252] = largest;
    compare(c, "halves");
  }

  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (float x : {0.f, -0.f, 1e-45f, 3e-37f, 5e-37f, 3e38f, infinity, -infinity, nan, -nan})
    for (int64_t place : {0, 16, 40}) {
      Case c = drawn(41, 9, 0, random);
      std::fill(c.rows[0].begin(), c.rows[0].end(), 0.f);
      c.rows[0][place] = x, c.rows[1][place] = x;
      compare(c, "the value " + std::to_string(x));
    }

  for (bool has_context : {false, true})
    for (int64_t B : {1, 3, 70})
      for (int64_t H : {1, 45, 200}) check_steps(B == 3 ? 2 : 1, B, H, has_context, random);

  std::printf("int8 products with");
  for (const Int8Set& set : int8_sets()) std::printf(" %s", set.name.c_str());
  std::printf(": %d failures\n", failures);
  return failures ? 1 : 0;
}
