// The CUDA engine's kernels on the emulator: any schedule gives the same bits, and every
// synchronisation is needed. tests/engines/test_cuda.py sees to it that the bits are right.
//
//   test_cuda               all kernels under random and adversarial schedules, then without each
//                           synchronisation in turn: some schedule must show the lack; passes in
//                           reverse; and the sizes of a pass's memory
//   test_cuda KERNEL        one kernel, under a few schedules: for ThreadSanitizer
//   test_cuda KERNEL SITE   the same without the synchronisation SITE
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/buffers.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/products.h"
#include "../../csrc/emulator/emulator.h"

using namespace mmixer;
using namespace mmixer::cuda;

namespace {

using Bits = std::vector<uint32_t>;
using Kernel = std::function<Bits()>;

std::mt19937 generator(7);

std::vector<float> random_floats(size_t size, float scale = 1) {
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<float> x(size);
  for (float& value : x) value = uniform(generator);
  return x;
}

std::vector<uint16_t> random_bfloat16(size_t size, float scale) {
  std::vector<uint16_t> x;
  for (const float value : random_floats(size, scale)) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    x.push_back(uint16_t(bits >> 16));
  }
  return x;
}

struct Output {
  std::vector<float> x;
  explicit Output(size_t size) : x(size, NAN) {}
  void append_to(Bits& bits) const {
    const size_t before = bits.size();
    bits.resize(before + x.size());
    std::memcpy(&bits[before], x.data(), x.size() * sizeof(float));
  }
};

constexpr int T = 5, B = 8, H = 128;  // two teams of 4 samples, one of 8
constexpr size_t rows = size_t(T) * B * H;

Kernel recurrence_forward(Path path, int samples) {
  const Variant variant = {path, samples, 1, Dtype::bfloat16};
  return [variant, weights = random_bfloat16(3 * H * H, 0.15f), input = random_floats(3 * rows),
          norms = random_floats(2 * 6 * H), hx = random_floats(B * H)] {
    Output output(rows / 2), states(rows), h_n(B * H / 2);  // output and h_n: bfloat16
    std::vector<uint64_t> packets(B / variant.samples * plan(variant, H, false).packets / 8,
                                  ~uint64_t(0));
    ForwardArguments a{};
    a.weights = weights.data(), a.input_gates = input.data(), a.norms = {norms.data(), true};
    a.hx = hx.data(), a.output = output.x.data(), a.h_n = h_n.x.data();
    a.output_stride = {0, B * H, H}, a.first_reverse = 1;
    a.states = states.x.data(), a.packets = packets.data();
    a.G = 1, a.T = T, a.B = B, a.H = H, a.eps = 1e-5f;
    recurrence(variant, B / variant.samples, a, false, nullptr);
    Bits bits;
    for (const Output* x : {&output, &states, &h_n}) x->append_to(bits);
    return bits;
  };
}

Kernel recurrence_backward(Path path, int samples) {
  const Variant variant = {path, samples, 1, Dtype::bfloat16};
  return [variant, weights = random_bfloat16(3 * H * H, 0.15f), x_hat = random_floats(3 * rows),
          projected = random_floats(3 * rows), r_std = random_floats(3 * T * B),
          norms = random_floats(2 * 6 * H), states = random_floats(rows),
          grad_output = random_floats(rows), grad_h_n = random_floats(B * H)] {
    Output da(3 * rows), f_tilde(rows), hx(B * H), norm(6 * B * H);
    std::vector<uint64_t> packets(B / variant.samples * plan(variant, H, true).packets / 8,
                                  ~uint64_t(0));
    BackwardArguments a{};
    a.weights = weights.data(), a.x_hat = x_hat.data(), a.projected = projected.data();
    a.r_std = r_std.data(), a.norms = {norms.data(), true}, a.states = states.data();
    a.first_reverse = 1;
    a.grad_output = grad_output.data(), a.grad_output_stride = {0, B * H, H};
    a.grad_h_n = grad_h_n.data(), a.grad_h_n_stride_sample = H, a.grad_gates = da.x.data();
    a.grad_f_tilde = f_tilde.x.data(), a.grad_hx = hx.x.data(), a.grad_norm = norm.x.data();
    a.packets = packets.data();
    a.G = 1, a.T = T, a.B = B, a.H = H;
    recurrence_backward(variant, B / variant.samples, a, false, nullptr);
    Bits bits;
    for (const Output* x : {&da, &f_tilde, &hx, &norm}) x->append_to(bits);
    return bits;
  };
}

PrepareArguments prepare_arguments(const void* weights, size_t matrix_bytes, Dtype dtype,
                                   int hidden) {
  PrepareArguments a{};
  for (int gate = 0; gate < step_gates; gate++)
    a.weight[0][gate] = static_cast<const char*>(weights) + gate * matrix_bytes;
  a.weight_dtype = a.norm_dtype = a.matrices_dtype = dtype;
  a.remove_mean = a.transposed = true;
  a.term_dtype = Dtype::bfloat16;
  a.G = a.count = 1, a.H = hidden;
  return a;
}

// Prepares weights for backward, and a set of more rows than shared memory holds at once.
Kernel prepare_weights() {
  constexpr int hidden = 70, padded = 128, many = 768;
  const std::vector<float> floats = random_floats(3 * many * many);
  return [weights = random_floats(3 * hidden * hidden), norms = random_floats(12 * hidden),
          doubles = std::vector<double>(floats.begin(), floats.end())] {
    Output matrices(3 * hidden * hidden), out_norms(12 * hidden), large(3 * many * many);
    std::vector<uint16_t> terms(2 * 3 * padded * padded, 0x7fff);
    PrepareArguments a =
        prepare_arguments(weights.data(), hidden * hidden * sizeof(float), Dtype::float32, hidden);
    a.norm[0][0] = norms.data(), a.norm[0][1] = norms.data() + 6 * hidden;
    a.matrices = matrices.x.data(), a.split_weights = terms.data(), a.norms = out_norms.x.data();
    a.has_context = true;
    a.Hp = padded, a.terms = 2;
    prepare(a, nullptr);
    a = prepare_arguments(doubles.data(), many * many * sizeof(double), Dtype::float64, many);
    a.matrices = large.x.data(), a.matrices_dtype = Dtype::float32;
    prepare(a, nullptr);
    Bits bits(terms.begin(), terms.end());
    for (const Output* x : {&matrices, &out_norms, &large}) x->append_to(bits);
    return bits;
  };
}

// A row-wise kernel whose blocks have several rows each.
Kernel row_wise() {
  constexpr int count = 6, hidden = 200;
  return [a_f = random_floats(count * hidden), grad = random_floats(count * hidden),
          norms = random_floats(12 * hidden)] {
    Output da(count * hidden), norm(2 * 2 * hidden);
    NormTanhBackwardArguments a{};
    a.G = 1, a.H = hidden, a.norms = {norms.data(), true}, a.eps = 1e-5;
    a.part[0] = {{count, 2, 1, 1}, gate_f,      a_f.data(),   grad.data(),
                 nullptr,          da.x.data(), norm.x.data()};
    norm_tanh_backward(a, nullptr);
    Bits bits;
    da.append_to(bits);
    norm.append_to(bits);
    return bits;
  };
}

// Makes two calls in one workspace, where packets of the first must not pass for the second's: the
// first has a context, the second as it is said. One team has eight samples, the other two.
Kernel cell_steps(bool second_has_context) {
  constexpr int F = 24, C = 20, batch = 10, hidden = 40, cell_samples = 8;
  std::vector<std::vector<float>> weights;
  for (const int columns : {F, C, 2 * hidden, hidden, hidden, hidden})
    weights.push_back(random_floats(hidden * columns, 0.3f));
  return [weights, second_has_context, input = random_floats(2 * batch * F),
          context = random_floats(batch * C), norms = random_floats(2 * 6 * hidden),
          hx = random_floats(batch * hidden)] {
    Problem problem{};
    problem.batch = batch, problem.hidden = hidden, problem.eps = 1e-5;
    problem.hx = hx.data(), problem.hx_stride_sample = hidden;
    Group group{};
    group.input_stride_sample = group.input_size = F;
    group.context = context.data(), group.context_stride_sample = group.context_size = C;
    for (int gate = 0; gate < gates; gate++) group.weight[gate] = weights[gate].data();
    group.norm_weight = norms.data(), group.norm_bias = norms.data() + 6 * hidden;
    const CellPlan chosen = cell_plan(problem, group);
    const CellPlan fewer_teams{cell_samples, 5, 0, ""};
    std::vector<uint64_t> workspace(chosen.workspace / 8);
    Bits bits;
    for (int call = 0; call < 2; call++) {
      Output output(batch * hidden);
      group.input = input.data() + call * batch * F;
      if (call == 1 && !second_has_context) {
        group.context = group.weight[gate_g] = group.weight[gate_s] = nullptr;
        group.context_size = 0;
      }
      cell(problem, group, fewer_teams, output.x.data(), workspace.data(), nullptr);
      output.append_to(bits);
    }
    return bits;
  };
}

// The first block has two tiles, of three slices each.
Kernel product() {
  constexpr int batch = 17, rows = 3, columns = 10, inner = 80;
  return [a = random_bfloat16(batch * rows * inner, 1),
          b = random_bfloat16(batch * inner * columns, 1)] {
    Output result(batch * rows * columns);
    const int processors = options().resident_blocks;
    options().product_kernel = true, options().resident_blocks = 1;
    multiply({batch,
              rows,
              columns,
              inner,
              {a.data(), inner, rows * inner, false},
              {b.data(), columns, inner * columns, false},
              Dtype::bfloat16,
              result.x.data(),
              columns,
              rows * columns,
              Dtype::float32,
              false},
             nullptr, nullptr);
    options().product_kernel = false, options().resident_blocks = processors;
    Bits bits;
    result.append_to(bits);
    return bits;
  };
}

std::map<std::string, Kernel> kernels() {
  return {{"forward_cluster", recurrence_forward(Path::cluster, 8)},
          {"forward_cluster_4", recurrence_forward(Path::cluster, 4)},
          {"forward_cooperative", recurrence_forward(Path::cooperative, 8)},
          {"forward_cooperative_4", recurrence_forward(Path::cooperative, 4)},
          {"forward_wide", recurrence_forward(Path::wide, 8)},
          {"forward_wide_4", recurrence_forward(Path::wide, 4)},
          {"backward_cluster", recurrence_backward(Path::cluster, 8)},
          {"backward_cluster_4", recurrence_backward(Path::cluster, 4)},
          {"backward_cooperative", recurrence_backward(Path::cooperative, 8)},
          {"backward_cooperative_4", recurrence_backward(Path::cooperative, 4)},
          {"backward_wide", recurrence_backward(Path::wide, 8)},
          {"backward_wide_4", recurrence_backward(Path::wide, 4)},
          {"prepare", prepare_weights()},
          {"row_wise", row_wise()},
          {"cell", cell_steps(true)},
          {"cell_without_context", cell_steps(false)},
          {"product", product()}};
}

void use_schedule(int schedule) {
  options().seed = 1000 + schedule;
  options().schedule = schedule % 2 ? Options::Schedule::adversarial : Options::Schedule::random;
}

// A pass of one step through L2 has the bits that it has in fresh memory where a pass of other
// inputs used it before, whose packets have the same step's number. Returns the number of failures.
int test_used_memory() {
  constexpr int F = 24, batch = 5, hidden = 40;
  std::vector<std::vector<uint16_t>> weights;
  for (const int columns : {F, F, 2 * hidden, hidden, hidden, hidden})
    weights.push_back(random_bfloat16(hidden * columns, 0.3f));
  const auto operands = random_bfloat16(3 * batch * F, 1);
  const auto norm = random_bfloat16(gates * hidden, 1);  // whose statistics alone depend on inputs
  Group group{};
  group.norm_weight = group.norm_bias = norm.data();
  group.input_size = group.input_stride_sample = F;
  group.context_size = group.context_stride_sample = F;
  for (int gate = 0; gate < gates; gate++) group.weight[gate] = weights[gate].data();
  Problem p{};
  p.groups = p.steps = 1, p.batch = batch, p.hidden = hidden, p.eps = 1e-5, p.has_context = true;
  p.dtype = p.weight_dtype = p.norm_dtype = Dtype::bfloat16, p.group = &group;
  PassPlan plan{};
  plan.path = Path::cooperative, plan.samples = 4, plan.terms = 1, plan.teams = 2;
  plan.term_dtype = Dtype::bfloat16;
  int failures = 0;
  for (int schedule = 0; schedule < 4; schedule++) {
    use_schedule(schedule);
    std::vector<uint64_t> memory[2];
    Bits results[2];
    for (int used : {0, 1}) {
      memory[used].resize(forward_workspace_size(p, plan) / sizeof(uint64_t) + 1);
      for (int call = used ? 0 : 1; call < 2; call++) {
        Output output(batch * hidden / 2), h_n(batch * hidden / 2);
        group.input = operands.data() + call * batch * F;
        group.context = operands.data() + 2 * batch * F;
        const Results to{output.x.data(), 0, 0, hidden, h_n.x.data()};
        forward(p, plan, to, nullptr, memory[used].data(), nullptr);
        results[used] = {};
        output.append_to(results[used]), h_n.append_to(results[used]);
      }
    }
    if (results[0] == results[1]) continue;
    std::printf("FAILED a pass in used memory has other results\n");
    failures++;
  }
  return failures;
}

// What a problem in reverse is compared in: three groups of odd sizes.
struct Directions {
  static constexpr int G = 3, B = 5, F = 3, C = 4, H = 21;
  Path path;
  int steps;
  bool has_context, has_norm, has_lengths, has_hx;
  Keep keep;
  std::vector<int64_t> lengths = {1, steps, (steps + 1) / 2, steps, 1};
  std::vector<std::vector<float>> weights[G];  // those that there are, then the norms
  std::vector<float> input[G], context[G], hx, grad_output[G], grad_h_n;

  Directions(Path path, int steps, unsigned flags)
      : path(path),
        steps(steps),
        has_context(flags & 1),
        has_norm(flags & 2),
        has_lengths(flags & 4),
        has_hx(flags & 8),
        keep(flags & 16 ? Keep::gates : Keep::states),
        hx(random_floats(G * B * H)),
        grad_h_n(random_floats(G * B * H)) {
    for (int g = 0; g < G; g++) {
      for (int gate = 0; gate < gates; gate++)
        if (has_gate(gate, has_context)) weights[g].push_back(random_floats(H * columns(gate)));
      for (int i = 0; i < 2 * has_norm; i++)
        weights[g].push_back(random_floats(norm_rows(has_context) * H));
      input[g] = random_floats(steps * B * F), context[g] = random_floats(B * C);
      grad_output[g] = random_floats(steps * B * H);
    }
  }

  static int columns(int gate) {
    return gate == gate_f ? F : gate == gate_g ? C : gate == gate_s ? 2 * H : H;
  }

  // A table of rows [steps][B] in the other order: each sample's own rows, and `rest` behind them.
  std::vector<float> turned(const std::vector<float>& table, float rest) const {
    const size_t row = table.size() / (steps * B);
    std::vector<float> result(table.size(), rest);
    for (int b = 0; b < B; b++) {
      const int64_t length = has_lengths ? lengths[b] : steps;
      for (int64_t t = 0; t < length; t++)
        std::copy_n(&table[(t * B + b) * row], row, &result[((length - 1 - t) * B + b) * row]);
    }
    return result;
  }

  struct Group {
    std::vector<float> output, grad_input, h_n, grad_hx;  // whose bits are compared
    std::vector<std::vector<float>> sums;                 // whose order of summands may differ
  };

  // The results of each group, whose last two run in reverse, with outputs beside each other; or,
  // turned around, are groups like the first, on inputs that are turned around beforehand.
  std::vector<Group> run(bool turn) const {
    const float nan = NAN;
    std::vector<float> inputs[G], output(G * steps * B * H, nan), h_n(G * B * H, nan);
    std::vector<float> grad_hx(G * B * H, nan), to_output(output.size(), nan);
    const int64_t across = turn ? steps * B * H : H, row = turn ? H : G * H;
    mmixer::Group groups[G] = {};
    GroupGradient gradients[G] = {};
    std::vector<Group> results(G);
    for (int g = 0; g < G; g++) {
      const bool turns = turn && g > 0;
      inputs[g] = turns ? turned(input[g], nan) : input[g];
      const std::vector<float> cotangent = turns ? turned(grad_output[g], nan) : grad_output[g];
      for (int i = 0; i < steps * B; i++)
        std::copy_n(&cotangent[i * H], H, &to_output[g * across + i * row]);
      mmixer::Group& group = groups[g];
      group.input = inputs[g].data(), group.input_size = group.input_stride_sample = F;
      group.input_stride_step = B * F, group.reverse = !turn && g > 0;
      Group& result = results[g];
      result.grad_input.assign(inputs[g].size(), nan);
      gradients[g].input = result.grad_input.data();
      if (has_context) {
        group.context = context[g].data(), group.context_size = group.context_stride_sample = C;
        gradients[g].context = result.sums.emplace_back(B * C, nan).data();
      }
      auto next = weights[g].begin();
      const auto take = [&](const void*& operand, void*& gradient) {
        operand = next->data();
        gradient = result.sums.emplace_back(next++->size(), nan).data();
      };
      for (int gate = 0; gate < gates; gate++)
        if (has_gate(gate, has_context)) take(group.weight[gate], gradients[g].weight[gate]);
      if (!has_norm) continue;
      take(group.norm_weight, gradients[g].norm_weight);
      take(group.norm_bias, gradients[g].norm_bias);
    }
    Problem p{};
    p.groups = G, p.steps = steps, p.batch = B, p.hidden = H, p.has_context = has_context;
    p.keep = keep, p.eps = 1e-5, p.group = groups;
    if (has_hx) p.hx = hx.data(), p.hx_stride_group = B * H, p.hx_stride_sample = H;
    if (has_lengths) p.lengths = lengths.data();
    PassPlan plan{};
    plan.path = path, plan.samples = 4, plan.terms = 2, plan.teams = 9;
    plan.term_dtype = Dtype::bfloat16;
    const auto words = [](int64_t bytes) { return std::vector<uint64_t>(bytes / 8 + 1, ~0ull); };
    std::vector<float> saved(saved_size(p), nan);
    std::vector<uint64_t> workspace = words(forward_workspace_size(p, plan));
    forward(p, plan, {output.data(), across, B * row, row, h_n.data()}, saved.data(),
            workspace.data(), nullptr);
    workspace = words(backward_workspace_size(p, plan, true));
    backward(p, plan, {to_output.data(), across, B * row, row, grad_h_n.data(), B * H, H},
             saved.data(), gradients, grad_hx.data(), workspace.data(), nullptr);
    for (int g = 0; g < G; g++) {
      Group& result = results[g];
      for (int i = 0; i < steps * B; i++)
        result.output.insert(result.output.end(), &output[g * across + i * row],
                             &output[g * across + i * row] + H);
      result.h_n.assign(&h_n[g * B * H], &h_n[g * B * H] + B * H);
      result.grad_hx.assign(&grad_hx[g * B * H], &grad_hx[g * B * H] + B * H);
      if (!turn || g == 0) continue;
      result.output = turned(result.output, 0);
      result.grad_input = turned(result.grad_input, 0);
    }
    return results;
  }
};

bool are_near(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i++)
    difference += std::pow(a[i] - b[i], 2), norm += double(b[i]) * b[i];
  return difference <= 1e-10 * norm;  // a NaN is not near
}

// A group that runs in reverse, beside one that does not, has the bits of a call whose inputs are
// turned around. Returns the number of failures.
int test_directions() {
  int failures = 0;
  const auto check = [&](bool ok, const std::string& name, const char* what) {
    if (ok) return;
    std::printf("FAILED: %s of %s differs\n", what, name.c_str());
    failures++;
  };
  for (const Path path : {Path::cluster, Path::cooperative, Path::step})
    for (const int steps : {1, 4})
      for (unsigned flags = 0; flags < 32; flags++) {
        const Directions directions(path, steps, flags);
        const auto reversed = directions.run(false), turned = directions.run(true);
        for (int g = 0; g < Directions::G; g++) {
          const auto &a = reversed[g], &b = turned[g];
          const std::string name = "path " + std::to_string(int(path)) +
                                   ", T = " + std::to_string(steps) + ", flags " +
                                   std::to_string(flags) + ", group " + std::to_string(g);
          check(a.output == b.output, name, "output");
          check(a.h_n == b.h_n, name, "h_n");
          check(a.grad_input == b.grad_input, name, "input's gradient");
          check(a.grad_hx == b.grad_hx, name, "hx's gradient");
          for (size_t i = 0; i < a.sums.size(); i++)
            check(are_near(a.sums[i], b.sums[i]), name, "a weight's gradient");
        }
      }
  return failures;
}

// Returns the number of failures.
int test_refusals() {
  mmixer::Group groups[2] = {};
  Problem p{};
  p.groups = 2, p.steps = p.batch = p.hidden = 1, p.group = groups;
  const auto is_taken = [&] {
    try {
      return cuda::check(p), true;
    } catch (const std::invalid_argument&) {
      return false;
    }
  };
  int failures = 0;
  const auto expect = [&](bool expected, const char* what) {
    if (is_taken() == expected) return;
    std::printf("FAILED: %s is%s taken\n", what, expected ? " not" : "");
    failures++;
  };
  for (mmixer::Group& group : groups) group.input_size = 1;
  expect(true, "a call without context");
  groups[1].reverse = true;
  expect(true, "a call of both directions");
  groups[0].reverse = true, groups[1].reverse = false;
  expect(false, "a group that runs in reverse before one that does not");
  groups[0].reverse = false, groups[1].context_size = 1;
  expect(false, "a context beside none");
  p.has_context = true;
  expect(false, "no context beside one");
  groups[0].context_size = 1;
  expect(true, "a call with contexts");
  return failures;
}

// Calls f with problems that differ in what the layout of a pass's memory depends on.
template <class F>
void each_layout(const F& f) {
  static const char some = 0;
  for (const int sets : {1, 2, 3})
    for (const bool equal : {true, false})
      for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::bfloat16})
        for (const bool stored : {true, false})
          for (const Keep keep : {Keep::nothing, Keep::states, Keep::gates})
            for (const unsigned flags : {0, 1, 2, 3}) {
              const bool all = flags & 1, has_context = flags & 2;
              std::vector<Group> groups(sets);
              for (int g = 0; g < sets; g++) {
                Group& group = groups[g];
                group.input_size = group.input_stride_sample = 5;
                if (has_context)
                  group.context_size = group.context_stride_sample = equal ? 7 : 7 + g;
                group.input_stride_step = all ? 15 : 16;
                for (int gate = 0; gate < gates; gate++)
                  if (has_gate(gate, has_context)) group.weight[gate] = &some;
                group.input = &some;
                if (has_context) group.context = &some;
                if (all) group.norm_weight = group.norm_bias = &some;
              }
              Problem p{};
              p.groups = sets, p.steps = 4, p.batch = 3, p.hidden = 33, p.keep = keep;
              p.has_context = has_context;
              p.dtype = dtype, p.group = groups.data();
              p.weight_dtype = p.norm_dtype =
                  !stored && dtype == Dtype::float32 ? Dtype::bfloat16 : dtype;
              if (all) p.hx = &some;
              PassPlan plan{};
              plan.path = dtype == Dtype::float64 || !all ? Path::step : Path::cooperative;
              plan.samples = 4, plan.terms = dtype == Dtype::bfloat16 ? 1 : 2, plan.teams = 2;
              plan.term_dtype = Dtype::bfloat16;
              f(p, plan);
            }
}

// The sizes that are asked for are those that the passes use.
int test_layouts() {
  int failures = 0;
  std::vector<char> memory(1 << 26);  // no layout touches it
  each_layout([&](const Problem& p, const PassPlan& plan) {
    const Saved saved(p.keep == Keep::nothing ? nullptr : memory.data(), p);
    const auto compare = [&](const char* what, int64_t used, int64_t size) {
      if (used == size) return;
      std::printf("FAILED: %s uses %lld bytes of %lld\n", what, (long long)used, (long long)size);
      failures++;
    };
    compare("forward", ForwardBuffers(memory.data(), p, plan, saved).arena.size(),
            forward_workspace_size(p, plan));
    if (p.keep == Keep::nothing) return;
    for (const bool weights : {true, false})
      compare("backward", BackwardBuffers(memory.data(), p, plan, saved, weights).arena.size(),
              backward_workspace_size(p, plan, weights));
  });
  return failures;
}

// Whether one of the schedules fails or gives other bits.
bool shows(const Kernel& kernel, const Bits& truth, int schedules, std::string& how) {
  for (int schedule = 0; schedule < schedules; schedule++) {
    use_schedule(schedule);
    try {
      if (kernel() == truth) continue;
      how = "other bits";
    } catch (const std::runtime_error& error) {
      how = error.what();
    }
    return true;
  }
  return false;
}

// Whether a shuffle just behind the site brings the lanes together, so that without it only the
// order of memory is lost. No schedule shows that, but ThreadSanitizer does (test_csrc.py).
bool orders_memory_alone(const std::string& site) {
  return site.rfind("backward.h", 0) == 0 && site.find("warp_sync") != std::string::npos;
}

int test_all() {
  int failures = test_layouts() + test_refusals() + test_used_memory() + test_directions();
  int planted = 0;
  std::map<std::string, bool> shown;  // kernels share code: one of them has to show its sites
  for (const auto& [name, kernel] : kernels()) {
    std::string how;
    use_schedule(0);
    clear_sites();
    const Bits truth = kernel();
    const std::vector<std::string> all = sites();
    if (all.empty()) failures++;
    if (shows(kernel, truth, 40, how)) {  // one schedule in ten has shown a real race
      std::printf("FAILED %s: %s\n", name.c_str(), how.c_str());
      failures++;
    }
    for (const std::string& site : all) {
      const bool is_wait = site.find("mbarrier_wait") != std::string::npos;
      for (const Fault::Kind kind : {Fault::skip, Fault::flip_parity}) {
        if (kind == Fault::flip_parity && !is_wait) continue;
        if (orders_memory_alone(site)) {
          std::printf("%s without %s: left to ThreadSanitizer\n", name.c_str(), site.c_str());
          continue;
        }
        planted++;
        options().fault = {kind, site};
        const bool found = shows(kernel, truth, 12, how);
        std::printf("%s %s %s: %s\n", name.c_str(), kind == Fault::skip ? "without" : "parity of",
                    site.c_str(), found ? how.c_str() : "not shown");
        shown[site + (kind == Fault::skip ? "" : " parity")] |= found;
      }
      options().fault = {};
    }
  }
  for (const auto& [fault, found] : shown)
    if (!found) {
      std::printf("FAILED no schedule shows %s\n", fault.c_str());
      failures++;
    }
  std::printf("%d faults planted, %d failures\n", planted, failures);
  return failures != 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 1) return test_all();
  const auto all = kernels();
  const auto kernel = all.find(words[1]);
  if (kernel == all.end()) return 2;
  if (count > 2) options().fault = {Fault::skip, words[2]};
  for (int schedule = 0; schedule < 2; schedule++) {
    use_schedule(schedule);
    try {
      kernel->second();
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  return 0;
}
