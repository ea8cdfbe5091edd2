// The CPU engine through csrc/cpu/engine.h, for sanitizers: all memory is of exactly the size that
// the interface states, and holds NaN where the engine has to write before it reads.
//
// test_engine [SET ...] runs the instruction sets named, or all that the processor has, and exits
// with 77 where it lacks one that is named. Every tile that is compiled for these sets has to run.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "../../csrc/cpu/team.h"
#include "tiles.h"

using namespace mmixer;
using namespace mmixer::cpu;

namespace {

using Values = std::vector<double>;

constexpr double nan = std::numeric_limits<double>::quiet_NaN(), eps = 1e-5;

std::atomic<int> failures{0};

void check(bool ok, const std::string& what) {
  if (!ok && ++failures <= 30) std::printf("FAILED: %s\n", what.c_str());
}

std::string text_of(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", x);
  return text;
}

// A group's tensors in the order of Group and GroupGradient.
constexpr int input = 0, context = 1, weight_f = 2, weight_g = 3, weight_s = 4, weight_r = 5;
constexpr int weight_z = 6, weight_h = 7, norm_weight = 8, norm_bias = 9, tensors = 10;

uint16_t upper_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return uint16_t(bits >> 16);
}

float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A problem, whose values are exact in bfloat16, and the gradients of its results.
struct Case {
  int64_t groups, steps, batch, hidden;
  unsigned flags;
  bool concat = flags & 1, layer_norm = flags & 2, has_lengths = flags & 4, has_hx = flags & 8;
  bool strided = flags & 16, has_context = !(flags & 64);
  std::vector<int64_t> lengths;
  // The tensors of each group, empty where the form has none, then hx.
  std::vector<Values> operands;
  Values grad_output, grad_h_n;

  int64_t input_size(int64_t g) const { return std::array{6, 17, 131}[(g + batch) % 3]; }
  int64_t context_size(int64_t g) const { return std::array{33, 2, 9}[(g + batch) % 3]; }
  int64_t length(int64_t b) const { return has_lengths ? lengths[b] : steps; }
  bool reverse(int64_t g) const { return flags >> (7 + g) & 1; }
  const Values& of(int64_t g, int tensor) const { return operands[g * tensors + tensor]; }

  Case(int64_t groups, int64_t steps, int64_t batch, int64_t hidden, unsigned flags)
      : groups(groups), steps(steps), batch(batch), hidden(hidden), flags(flags) {
    std::mt19937 random(flags);
    const auto draw = [&](int64_t size, double centre, double width) {
      std::uniform_real_distribution<float> distribution(centre - width, centre + width);
      Values values(size);
      for (double& value : values) value = widen(upper_half(distribution(random)));
      return values;
    };
    const int64_t H = hidden;
    lengths = std::vector<int64_t>(batch);
    for (int64_t& length : lengths) length = 1 + random() % steps;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t D = input_size(g), C = context_size(g);
      operands.push_back(draw(steps * batch * D, 0, 1.7));
      operands.push_back(draw(has_context ? batch * C : 0, 0, 1.7));
      const int64_t columns[] = {D, C, 2 * H, H, H, H};
      for (int gate = 0; gate < gates; gate++)
        operands.push_back(draw(has_gate(gate, has_context) ? H * columns[gate] : 0, 0,
                                1.7 / std::sqrt(columns[gate])));
      const int64_t norms = layer_norm ? norm_rows(has_context) * H : 0;
      operands.push_back(draw(norms, 1, 0.3));
      operands.push_back(draw(norms, 0, 0.3));
    }
    operands.push_back(draw(groups * batch * H, 0, has_hx ? 1 : 0));
    grad_output = draw(groups * steps * batch * H, 0, 1);
    grad_h_n = draw(groups * batch * H, 0, 1);
    // Nobody may read past a sample's length.
    for (int64_t i = 0; i < groups * steps * batch; i++) {
      const int64_t g = i / (steps * batch), row = i % (steps * batch), D = input_size(g);
      if (row / batch < length(row % batch)) continue;
      std::fill_n(operands[g * tensors + input].data() + row * D, D, nan);
      std::fill_n(grad_output.data() + i * H, H, nan);
    }
  }

  std::string text() const {
    std::string directions;
    for (int64_t g = 0; g < groups; g++) directions += reverse(g) ? '<' : '>';
    return "G" + std::to_string(groups) + " T" + std::to_string(steps) + " B" +
           std::to_string(batch) + " H" + std::to_string(hidden) + (concat ? " concat" : "") +
           (layer_norm ? " norm" : "") + (has_lengths ? " lengths" : "") + (has_hx ? " hx" : "") +
           (strided ? " strided" : "") + (has_context ? " context " : " ") + directions;
  }
};

struct Options {
  int threads = 1;
  bool bfloat16 = false, recompute = false, need_input = true, need_weights = true;
  bool backward = true;
  // As a stream calls it: the contexts' shares are given, and the states are overwritten.
  bool stream = false;
  // The weights of forward are packed before. It may then read no other, but that of a single step.
  bool packed = false;
};

// Rows [a, b, c] as they may lie in memory: contiguous, or b and c exchanged and NaN between rows.
template <class T>
struct Placed {
  std::vector<T> memory;
  int64_t stride[3];

  Placed(const Values& values, int64_t a, int64_t b, int64_t c, bool strided) {
    const int64_t rows = a * b * c, size = int64_t(values.size()) / rows;
    const int64_t pitch = strided ? size + 3 : size;
    stride[0] = b * c * pitch;
    stride[1] = strided ? pitch : c * pitch;
    stride[2] = strided ? b * pitch : pitch;
    memory = std::vector<T>((rows - 1) * pitch + size, T(nan));
    for (int64_t i = 0; i < rows; i++)
      std::copy_n(values.data() + i * size, size,
                  memory.data() + i / (b * c) * stride[0] + i / c % b * stride[1] +
                      i % c * stride[2]);
  }

  // The values of memory that is written, in order; checks that what lies between rows is not.
  std::vector<T> read(int64_t a, int64_t b, int64_t c, const std::string& what) const {
    std::vector<T> values, rest = memory;
    const int64_t size =
        int64_t(memory.size()) - (a - 1) * stride[0] - (b - 1) * stride[1] - (c - 1) * stride[2];
    for (int64_t i = 0; i < a * b * c; i++) {
      const int64_t first = i / (b * c) * stride[0] + i / c % b * stride[1] + i % c * stride[2];
      values.insert(values.end(), memory.data() + first, memory.data() + first + size);
      std::fill_n(rest.data() + first, size, T(nan));
    }
    check(std::all_of(rest.begin(), rest.end(), [](T x) { return std::isnan(x); }),
          what + ": memory between the rows of output is written");
    return values;
  }
};

// output, h_n, the gradients in the order of Case::operands (empty where not wanted), and what
// forward saved (empty with recompute, which saves less).
template <class T>
using Tensors = std::vector<std::vector<T>>;

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
Tensors<T> run(const Case& c, const Options& options) {
  const int64_t G = c.groups, B = c.batch, H = c.hidden;
  std::vector<Placed<T>> placed;
  std::vector<std::vector<T>> stored;
  std::vector<std::vector<uint16_t>> stored_halves;
  const auto place = [&](const Values& values, int64_t a, int64_t b) -> const Placed<T>& {
    return placed.emplace_back(values, a, b, B, c.strided);
  };
  const auto store = [&](const Values& values, bool bfloat16) -> const void* {
    if (values.empty()) return nullptr;
    if (!bfloat16) return stored.emplace_back(values.begin(), values.end()).data();
    std::vector<uint16_t>& halves = stored_halves.emplace_back(values.size());
    std::transform(values.begin(), values.end(), halves.begin(), upper_half);
    return halves.data();
  };
  constexpr Dtype dtype = sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64;
  Problem p{};
  p.groups = G, p.steps = c.steps, p.batch = B, p.hidden = H;
  p.has_context = c.has_context;
  p.mix = c.concat ? Mix::concat : Mix::gated;
  p.dtype = dtype;
  p.weight_dtype = options.bfloat16 ? Dtype::bfloat16 : dtype;
  p.norm_dtype = options.bfloat16 && c.strided ? Dtype::bfloat16 : dtype;
  p.keep = !options.backward ? Keep::nothing : options.recompute ? Keep::states : Keep::gates;
  p.eps = eps;
  p.threads = options.threads;
  p.lengths = c.has_lengths ? c.lengths.data() : nullptr;
  std::vector<Group> groups(G);
  for (int64_t g = 0; g < G; g++) {
    Group& group = groups[g];
    const Placed<T>& in = place(c.of(g, input), 1, c.steps);
    group.input = in.memory.data();
    group.input_stride_step = in.stride[1], group.input_stride_sample = in.stride[2];
    group.input_size = c.input_size(g);
    group.reverse = c.reverse(g);
    if (c.has_context) {
      const Placed<T>& context_rows = place(c.of(g, context), 1, 1);
      group.context = context_rows.memory.data();
      group.context_stride_sample = context_rows.stride[2];
      group.context_size = c.context_size(g);
    }
    const bool bfloat16_norms = p.norm_dtype == Dtype::bfloat16;
    for (int gate = 0; gate < gates; gate++)
      group.weight[gate] = store(c.of(g, weight_f + gate), options.bfloat16);
    group.norm_weight = store(c.of(g, norm_weight), bfloat16_norms);
    group.norm_bias = store(c.of(g, norm_bias), bfloat16_norms);
  }
  p.group = groups.data();
  const Placed<T> hx(c.operands.back(), G, 1, B, c.strided);
  if (c.has_hx)
    p.hx = hx.memory.data(), p.hx_stride_group = hx.stride[0], p.hx_stride_sample = hx.stride[2];

  const auto fresh = [](int64_t size) { return std::vector<T>(size, T(nan)); };
  Tensors<T> results{{}, fresh(G * B * H)};
  std::vector<T> share = fresh(options.stream && c.has_context ? G * 2 * B * H : 0);
  if (!share.empty()) {
    std::vector<Group> bare = groups;
    for (Group& group : bare) group.input = nullptr;
    Problem of_contexts = p;
    of_contexts.group = bare.data(), of_contexts.hx = nullptr, of_contexts.lengths = nullptr;
    std::vector<T> memory = fresh(forward_workspace_size(of_contexts));
    context_share(of_contexts, share.data(), memory.data());
    // Nobody may read what the share stands for.
    for (int64_t g = 0; g < G; g++) {
      Values w_s = c.of(g, weight_s);
      for (int64_t j = 0; j < H; j++) std::fill_n(w_s.data() + (2 * j + 1) * H, H, nan);
      groups[g].share = share.data() + g * 2 * B * H;
      groups[g].context = nullptr;
      groups[g].weight[gate_g] = store(Values(c.of(g, weight_g).size(), nan), options.bfloat16);
      groups[g].weight[gate_s] = store(w_s, options.bfloat16);
    }
  }
  if (options.stream && c.has_hx) {
    std::copy(c.operands.back().begin(), c.operands.back().end(), results[1].begin());
    p.hx = results[1].data(), p.hx_stride_group = B * H, p.hx_stride_sample = H;
  }
  const std::vector<Group> whole = groups;
  std::vector<T> packed;
  if (options.packed) {
    packed = fresh(packed_size(p));
    pack(p, packed.data());
    p.packed = packed.data();
    Values w_s = c.of(0, weight_s);
    for (int64_t j = 0; j < H && c.has_context; j++) std::fill_n(w_s.data() + 2 * j * H, H, nan);
    for (Gate gate : {gate_f, gate_s, gate_r, gate_z, gate_h})
      if (c.steps > 1)
        groups[0].weight[gate] =
            store(gate == gate_s ? w_s : Values(c.of(0, weight_f + gate).size(), nan),
                  options.bfloat16);
  }
  std::vector<T> saved = fresh(saved_size(p));
  std::vector<T> workspace = fresh(forward_workspace_size(p));
  Placed<T> output(Values(G * c.steps * B * H, nan), G, c.steps, B, c.strided);
  if (options.stream && c.steps == 1) {
    forward(p, {results[1].data(), B * H, 0, H, results[1].data()}, nullptr, workspace.data());
    results[0] = results[1];
    return results;
  }
  forward(p,
          {output.memory.data(), output.stride[0], output.stride[1], output.stride[2],
           results[1].data()},
          options.backward ? saved.data() : nullptr, workspace.data());
  results[0] = output.read(G, c.steps, B, c.text());
  if (!options.backward) return results;

  groups = whole;
  p.packed = nullptr;
  std::vector<GroupGradient> gradients(G);
  for (int64_t g = 0; g < G; g++) {
    GroupGradient& to = gradients[g];
    void** target[] = {&to.input,          &to.context,        &to.weight[gate_f],
                       &to.weight[gate_g], &to.weight[gate_s], &to.weight[gate_r],
                       &to.weight[gate_z], &to.weight[gate_h], &to.norm_weight,
                       &to.norm_bias};
    for (int i = 0; i < tensors; i++) {
      const bool wanted = i == context || (i == input ? options.need_input : options.need_weights);
      results.push_back(fresh(wanted ? int64_t(c.of(g, i).size()) : 0));
      *target[i] = results.back().empty() ? nullptr : results.back().data();
    }
  }
  results.push_back(fresh(G * B * H));
  const Placed<T> grad_output(c.grad_output, G, c.steps, B, c.strided);
  const Placed<T> grad_h_n(c.grad_h_n, G, 1, B, c.strided);
  Cotangents cotangents{};
  cotangents.grad_output = grad_output.memory.data();
  cotangents.grad_output_stride_group = grad_output.stride[0];
  cotangents.grad_output_stride_step = grad_output.stride[1];
  cotangents.grad_output_stride_sample = grad_output.stride[2];
  cotangents.grad_h_n = grad_h_n.memory.data();
  cotangents.grad_h_n_stride_group = grad_h_n.stride[0];
  cotangents.grad_h_n_stride_sample = grad_h_n.stride[2];
  workspace = fresh(backward_workspace_size(p, options.need_weights));
  const std::vector<T> before = saved;
  backward(p, cotangents, saved.data(), gradients.data(), results.back().data(), workspace.data());
  check(same_bits(saved, before), c.text() + ": backward wrote to the saved memory");
  results.push_back(options.recompute ? std::vector<T>() : std::move(saved));
  return results;
}

// Output and h_n by equations 7-14, as in mmixer_kernels/reference.py; a group that runs in reverse
// begins with each sample's last step.
Tensors<double> reference(const Case& c) {
  const int64_t H = c.hidden;
  Tensors<double> results{Values(c.grad_output.size(), 0), Values(c.grad_h_n.size())};
  for (int64_t g = 0; g < c.groups; g++)
    for (int64_t b = 0; b < c.batch; b++) {
      const auto row = [](const Values& x, int64_t number, int64_t size) {
        return Values(x.begin() + number * size, x.begin() + (number + 1) * size);
      };
      // LN(W x), the rows of the norms in the order of the weights.
      const auto project = [&](int weight, const Values& x) {
        const double* w = c.of(g, weight).data();
        Values y(H, 0);
        for (double& sum : y)
          for (double value : x) sum += *w++ * value;
        if (!c.layer_norm) return y;
        double mean = 0, variance = 0;
        for (double value : y) mean += value / H;
        for (double value : y) variance += (value - mean) * (value - mean) / H;
        const int64_t norm = norm_row(weight - weight_f, c.has_context);
        const Values scale = row(c.of(g, norm_weight), norm, H);
        const Values shift = row(c.of(g, norm_bias), norm, H);
        for (int64_t j = 0; j < H; j++)
          y[j] = (y[j] - mean) / std::sqrt(variance + eps) * scale[j] + shift[j];
        return y;
      };
      const auto sum = [](const Values& x, const Values& y) {
        Values z = x;
        for (size_t j = 0; j < z.size(); j++) z[j] += y[j];
        return z;
      };
      const auto squash = [](Values x) {
        for (double& value : x) value = std::tanh(value);
        return x;
      };
      const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
      const auto mix = [](double gate, double x, double y) { return gate * x + (1 - gate) * y; };
      Values h = row(c.operands.back(), g * c.batch + b, H);
      const auto mixed = [&](Values joint) {
        const Values g_bar = squash(project(weight_g, row(c.of(g, context), b, c.context_size(g))));
        joint.insert(joint.end(), g_bar.begin(), g_bar.end());
        Values f = project(weight_s, joint);
        for (int64_t j = 0; j < H; j++)
          if (!c.concat) f[j] = mix(sigmoid(f[j]), joint[j], g_bar[j]);
        return f;
      };
      for (int64_t i = 0; i < c.length(b); i++) {
        const int64_t t = c.reverse(g) ? c.length(b) - 1 - i : i;
        Values f = squash(project(weight_f, row(c.of(g, input), t * c.batch + b, c.input_size(g))));
        if (c.has_context) f = mixed(f);
        const Values r = project(weight_r, sum(f, h)), z = project(weight_z, sum(f, h));
        Values v = f;
        for (int64_t j = 0; j < H; j++) v[j] += sigmoid(r[j]) * h[j];
        const Values n = project(weight_h, v);
        for (int64_t j = 0; j < H; j++) h[j] = mix(sigmoid(z[j]), std::tanh(n[j]), h[j]);
        std::copy(h.begin(), h.end(), results[0].begin() + ((g * c.steps + t) * c.batch + b) * H);
      }
      std::copy(h.begin(), h.end(), results[1].begin() + (g * c.batch + b) * H);
    }
  return results;
}

template <class A>
double largest_difference(const std::vector<A>& a, const Values& b) {
  double largest = 0;
  for (size_t i = 0; i < b.size(); i++) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

// What a relative rounding error of 1 makes of each result of `exact`: its largest value, and its
// change, where every operand changes by such an error; this is the most of three random changes,
// each by 2^-24, as small as float's own.
//
// The change is what counts where LayerNorm has few values: where they lie close together, 1 over
// their deviation is large, and so is what an error of their sums makes of all that follows. In
// float, input's gradient of G1 T1 B6 H3 is off by 7e-5 of its largest value, and a change of the
// operands by 2^-24 moves it by 5e-4. (Of LayerNorm over two values, which is not among the cases,
// the gradient cancels but for eps, whatever the operands, and float leaves its rounding there.)
Values sensitivity(const Case& c, const Tensors<double>& exact) {
  constexpr double unit = 1. / (1 << 24);
  Values largest;
  for (const Values& result : exact) {
    largest.push_back(0.1);
    for (double value : result) largest.back() = std::max(largest.back(), std::abs(value));
  }
  Values most(exact.size(), 0);
  std::mt19937 random(1);
  for (int round = 0; round < 3; round++) {
    Case near = c;
    const auto change = [&](Values& values) {
      for (double& value : values) value *= random() % 2 ? 1 + unit : 1 - unit;
    };
    for (Values& operand : near.operands) change(operand);
    change(near.grad_output);
    change(near.grad_h_n);
    const Tensors<double> results = run<double>(near, Options());
    for (size_t i = 0; i < exact.size(); i++)
      most[i] = std::max(most[i], largest_difference(results[i], exact[i]) / unit);
  }
  for (size_t i = 0; i < exact.size(); i++) most[i] += largest[i];
  return most;
}

// Checks that errors are below 16 rounding errors of A times `sensitive`; leaves out what forward
// saved.
template <class A>
void check_close(const Tensors<A>& a, const Tensors<double>& b, const Values& sensitive,
                 const std::string& what) {
  constexpr double bound = 16 * std::numeric_limits<A>::epsilon() / 2;
  for (size_t i = 0; i < std::min(a.size(), b.size() - 1); i++) {
    const double error = largest_difference(a[i], b[i]);
    check(error <= bound * sensitive[i],
          what + ": result " + std::to_string(i) + " is off by " + text_of(error) + ", " +
              text_of(error / (bound * sensitive[i])) + " of what it may be");
  }
}

double functional(const Case& c, const Tensors<double>& results) {
  double sum = 0;
  for (size_t i = 0; i < c.grad_output.size(); i++)
    if (!std::isnan(c.grad_output[i])) sum += c.grad_output[i] * results[0][i];
  for (size_t i = 0; i < c.grad_h_n.size(); i++) sum += c.grad_h_n[i] * results[1][i];
  return sum;
}

// Compares the gradient with the slope along a random direction of all operands.
void check_gradient(const Case& c, const Tensors<double>& results, const std::string& what) {
  constexpr double step = 1e-6;
  Options forward_only;
  forward_only.backward = false;
  Case ahead = c, behind = c;
  ahead.has_hx = behind.has_hx = true;
  std::mt19937 random(1);
  std::uniform_real_distribution<double> distribution(-1, 1);
  double slope = 0, square = 0;
  for (size_t i = 0; i < c.operands.size(); i++)
    for (size_t j = 0; j < c.operands[i].size(); j++) {
      const double direction = distribution(random), part = results[2 + i][j] * direction;
      ahead.operands[i][j] += step * direction;
      behind.operands[i][j] -= step * direction;
      slope += part;
      square += part * part;
    }
  const double difference = functional(c, run<double>(ahead, forward_only)) -
                            functional(c, run<double>(behind, forward_only));
  const double error = std::abs(difference / (2 * step) - slope) / std::max(1., std::sqrt(square));
  check(error < 1e-8, what + ": the gradient is off by " + text_of(error));
}

// Returns the results of one thread, and checks that other options give the same bits.
template <class T>
Tensors<T> check_options(const Case& c, bool bfloat16, const std::string& what) {
  Options options;
  options.bfloat16 = bfloat16;
  const Tensors<T> alone = run<T>(c, options);
  for (const std::vector<T>& values : alone)
    check(std::all_of(values.begin(), values.end(), [](T x) { return std::isfinite(x); }),
          what + ": not all results are finite");
  for (int variant = 0; variant < 5; variant++) {
    options.packed = c.groups == 1 && variant < 3;
    options.threads = variant % 2 ? 4 : 2;
    options.recompute = variant == 1 || variant == 2 || variant == 4;
    options.need_input = variant < 2 || variant == 4;
    options.need_weights = variant < 3;
    const Tensors<T> other = run<T>(c, options);
    for (size_t i = 0; i < alone.size(); i++)
      check(other[i].empty() || same_bits(other[i], alone[i]),
            what + ": result " + std::to_string(i) + " differs with " +
                std::to_string(options.threads) + " threads" +
                (options.recompute ? ", recompute" : "") + (options.packed ? ", packed" : "") +
                (options.need_input ? "" : ", without input's gradient") +
                (options.need_weights ? "" : ", without weights' gradients"));
  }
  Options of_stream;
  of_stream.bfloat16 = bfloat16, of_stream.backward = false, of_stream.stream = true;
  for (int threads : {1, 2, 4}) {
    of_stream.threads = threads;
    of_stream.packed = c.groups == 1 && threads < 4;
    const Tensors<T> other = run<T>(c, of_stream);
    for (size_t i = 0; i < other.size(); i++)
      check(same_bits(other[i], alone[i]), what + ": result " + std::to_string(i) +
                                               " differs in a stream with " +
                                               std::to_string(threads) + " threads");
  }
  return alone;
}

void check_calls_at_once(const Case& c, const std::string& what) {
  Options options;
  const Tensors<float> expected = run<float>(c, options);
  options.threads = 2;
  Tensors<float> results[2];
  std::vector<std::thread> threads;
  for (Tensors<float>& result : results)
    threads.emplace_back([&] { result = run<float>(c, options); });
  for (std::thread& thread : threads) thread.join();
  for (const Tensors<float>& result : results)
    for (size_t i = 0; i < expected.size(); i++)
      check(same_bits(result[i], expected[i]), what + ": calls at once differ");
}

// Checks that every tile of the sets has run, and prints how many each set has.
void check_tiles(const std::vector<std::string>& sets) {
  for (const std::string& set : sets) {
    int count = 0;
    for (const tests::Tile* tile = tests::first_tile(); tile; tile = tile->next) {
      if (tile->set != set) continue;
      count++;
      check(tile->ran, set + ": no case runs " + tile->kernel + "'s tile of " +
                           std::to_string(tile->rows) + " x " + std::to_string(tile->columns) +
                           " of " + std::to_string(tile->bits) + " bits");
    }
    check(count > 0, set + " has no tiles");
    std::printf("%s has %d tiles\n", set.c_str(), count);
  }
}

// Names the sets of this build that this processor lacks.
void print_missing() {
  std::set<std::string> missing;
  for (const tests::Tile* tile = tests::first_tile(); tile; tile = tile->next)
    missing.insert(tile->set);
  for (const std::string& set : instruction_sets()) missing.erase(set);
  for (const std::string& set : missing)
    std::printf("not run, as this processor lacks it: %s (python tests/instruction_sets.py %s)\n",
                set.c_str(), set.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> sets(argv + 1, argv + argc);
  if (sets.empty()) sets = instruction_sets();
  check(instruction_set() == instruction_sets().front(), "the best set is not the default");
  for (const std::string& set : sets)
    if (!use_instruction_set(set)) {
      std::printf("this processor, or this build, lacks %s\n", set.c_str());
      return 77;
    }
  set_available_processors(4);  // teams of four members on any machine
  check(!use_instruction_set("none"), "a set that there is not can be used");
  std::mt19937 random(0);
  std::vector<Case> cases;
  for (int64_t H : {1, 5, 17, 45})
    for (int64_t B : {1, 3, 9, 13})
      for (int64_t T : {1, 2, 7}) {
        const unsigned flags = random();
        cases.emplace_back(flags & 32 ? 1 : 3, T, B, H, flags);
      }
  // These run the tiles that no other case runs with one set or another; see check_tiles.
  for (const auto [T, B, H] : {std::array<int64_t, 3>{1, 1, 29},
                               {1, 1, 84},
                               {1, 3, 2},
                               {1, 3, 109},
                               {2, 1, 3},
                               {2, 1, 125},
                               {2, 2, 95},
                               {2, 3, 61},
                               {2, 3, 92}})
    cases.emplace_back(1, T, B, H, H > 3 ? 2 : 0);
  // LayerNorm over three values that lie close together; see `sensitivity`.
  cases.emplace_back(1, 1, 6, 3, 2);
  // These have more rows than a weight gradient packs at a time.
  cases.emplace_back(1, 41, 13, 5, 2 | 16);
  cases.emplace_back(1, 41, 13, 5, 2 | 4 | 64 | 128);
  const size_t first_team = cases.size();
  // These are large enough for teams of two and of four. Each member takes samples of its own where
  // there are 32, eight at a time, where there are 13, four at a time in the team of four, and
  // where there are 256.
  cases.emplace_back(3, 3, 4, 105, 2 | 4 | 8 | 16);
  cases.emplace_back(3, 3, 13, 61, 1 | 4);
  cases.emplace_back(1, 2, 32, 65, 2 | 8);
  cases.emplace_back(1, 1, 5, 170, 2 | 16);
  cases.emplace_back(1, 2, 256, 17, 2 | 4 | 64 | 128);
  // Both directions, each by a member of its own in the team of two.
  cases.emplace_back(2, 3, 4, 105, 2 | 4 | 8 | 64 | 256);
  cases.emplace_back(2, 3, 13, 61, 4 | 16 | 64 | 256);
  cases.emplace_back(2, 2, 32, 65, 2 | 256);
  for (size_t number = 0; number < cases.size(); number++) {
    const Case& c = cases[number];
    const Tensors<double> truth = reference(c);
    Values sensitive;
    for (const std::string& set : sets) {
      use_instruction_set(set);
      const std::string what = set + " " + c.text();
      const Tensors<double> exact = check_options<double>(c, false, what + " double");
      if (sensitive.empty()) sensitive = sensitivity(c, exact);
      check_close(truth, exact, sensitive, what + " double");
      check_gradient(c, exact, what);
      for (bool bfloat16 : {false, true}) {
        const std::string type = bfloat16 ? " bfloat16" : " float";
        check_close(check_options<float>(c, bfloat16, what + type), exact, sensitive, what + type);
      }
      if (number >= first_team) check_calls_at_once(c, what);
    }
  }
  check_tiles(sets);
  print_missing();
  std::printf("%zu problems with", cases.size());
  for (const std::string& set : sets) std::printf(" %s", set.c_str());
  std::printf(": %d failures\n", failures.load());
  return failures ? 1 : 0;
}
