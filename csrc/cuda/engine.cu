// The launches of a pass, in order, for one weight set, or for several of equal sizes: (n) stands
// for one per weight set. With "gated", LayerNorm and a persistent kernel in one round they are,
//
// forward, 9 (G = 3: 11):
//   prepare | x W_f^T (n) | c W_g^T | norm_tanh of f and g | f_bar W_sf^T | g_bar W_sg^T | mix |
//   W_r, W_z and W_h times f_tilde | recurrence
//
// backward, 18 (G = 3: 22), and with Keep::states 6 more (8), which compute the prologue again:
//   prepare | W_r and W_z times h and f_tilde | reset_gate | W_h times f_tilde and r h |
//   update_gate | V | recurrence_backward | mix_backward | step_sum | da_s W_sf | sum(da_s) W_sg |
//   norm_tanh_backward of f and g | da_f W_f (n) | da_g W_g | da_f^T x (n) | da_s^T f_bar |
//   da^T of r, z and h | finish
//
// Without context they are, again for one weight set and for three,
//
// forward, 5 (7):
//   prepare | x W_f^T (n) | norm_tanh of f | W_r, W_z and W_h times f_tilde | recurrence
//
// backward, 12 (16), and with Keep::states 2 more (4):
//   prepare | W_r and W_z times h and f_tilde | reset_gate | W_h times f_tilde and r h |
//   update_gate | V | recurrence_backward | norm_tanh_backward of f | da_f W_f (n) | da_f^T x (n) |
//   da^T of r, z and h | finish
//
// Weight sets that run in reverse go through the same launches as the others, beside them. Where
// all have one input, as both directions do, x W_f^T and da_f^T x are one product each. Contexts of
// unequal sizes take a product per weight set. On path step the recurrence is two products and two
// kernels per step. More weight sets, or more copies, than a launch takes (arguments.h), take more
// launches of prepare and finish.
#include "engine.h"

#include <algorithm>
#include <climits>
#include <stdexcept>

#include "buffers.h"

namespace mmixer::cuda {
namespace {

constexpr int copy_warps = 8;              // per block that copies, for the number of blocks alone
constexpr int64_t most_copy_blocks = 512;  // per copy

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Hands the copies to launches of a kernel, each of which also has at most most_weight_sets weight
// sets: call(first, count) launches it with those.
template <int most, class Call>
void in_launches(Copies<most>& arguments, const std::vector<Copy>& copies, int64_t sets,
                 const Call& call) {
  int64_t set = 0;
  size_t next = 0;
  do {
    arguments.copies = 0;
    for (int end = 0; next < copies.size() && arguments.copies < most; next++) {
      Copy& copy = arguments.copy[arguments.copies++] = copies[next];
      const int64_t pieces = (copy.columns + copied_columns - 1) / copied_columns;
      const int64_t warps = copy.tables * copy.rows * pieces;
      end += int(std::min((warps + copy_warps - 1) / copy_warps, most_copy_blocks));
      copy.end = end;
    }
    const int count = int(std::min<int64_t>(sets - set, most_weight_sets));
    call(int(set), count);
    set += count;
  } while (set < sets || next < copies.size());
}

// The number of the first group that runs in reverse, or of all groups.
int first_reverse(const Problem& p) {
  const Group* const end = p.group + p.groups;
  return int(std::find_if(p.group, end, [](const Group& group) { return group.reverse; }) -
             p.group);
}

// What both passes have in common.
class Pass {
 protected:
  Pass(const Problem& problem, const PassPlan& plan, void* products, void* stream)
      : p(problem),
        plan(plan),
        s(problem),
        G(int(p.groups)),
        T(int(p.steps)),
        B(int(p.batch)),
        H(int(p.hidden)),
        first_reverse(cuda::first_reverse(p)),
        persistent(plan.path != Path::step),
        removes_mean(persistent && s.has_norm),
        products_(products),
        stream(stream) {}

  void* at(void* array, int64_t i) const { return element(array, s.operand, i); }
  void* wide_at(void* array, int64_t i) const { return element(array, s.wide, i); }

  // A product of operands, or of wide matrices, whose result is wide.
  void multiply(int64_t batch, int64_t rows, int64_t columns, int64_t inner, const Operand& a,
                const Operand& b, void* result, int64_t stride, int64_t batch_stride, Dtype dtype,
                Dtype result_dtype) const {
    cuda::multiply({batch, rows, columns, inner, a, b, dtype, result, stride, batch_stride,
                    result_dtype, plan.allow_tf32},
                   products_, stream);
  }
  void multiply(int64_t batch, int64_t rows, int64_t columns, int64_t inner, const Operand& a,
                const Operand& b, void* result, int64_t stride, int64_t batch_stride) const {
    multiply(batch, rows, columns, inner, a, b, result, stride, batch_stride, s.operand, s.wide);
  }

  // Calls product(g, batch) for all weight sets in one batch, or for each.
  template <class F>
  void of_sets(bool in_one, const F& product) const {
    if (in_one)
      product(0, G);
    else
      for (int g = 0; g < G; g++) product(g, 1);
  }

  void prepare(const Prepared& prepared, std::vector<Copy>& copies, bool backward) const {
    if (p.hx)
      copies.push_back({p.hx, prepared.hx, G, B, H, p.hx_stride_group, p.hx_stride_sample,
                        int64_t(B) * H, H, nullptr, s.operand, s.wide, 0});
    if (prepared.packets_size)
      copies.push_back({nullptr, prepared.packets, 1, 1, prepared.packets_size / 4, 0, 0, 0, 0,
                        nullptr, Dtype::float32, Dtype::float32, 0});
    PrepareArguments a{};
    a.weight_dtype = p.weight_dtype, a.norm_dtype = p.norm_dtype;
    a.remove_mean = removes_mean, a.transposed = backward;
    a.matrices = prepared.matrices, a.matrices_dtype = s.operand;
    a.split_weights = static_cast<uint16_t*>(prepared.split_weights);
    a.term_dtype = plan.term_dtype;
    a.norms = prepared.norms, a.has_context = s.has_context;
    a.G = G, a.H = H, a.terms = plan.terms;
    a.Hp = persistent ? padded_size(plan, H, backward) : H;
    in_launches(a, copies, G, [&](int first, int count) {
      a.first = first, a.count = count;
      for (int i = 0; i < count; i++) {
        const Group& group = p.group[first + i];
        std::copy_n(group.weight + gate_r, step_gates, a.weight[i]);
        a.norm[i][0] = group.norm_weight, a.norm[i][1] = group.norm_bias;
      }
      cuda::prepare(a, stream);
    });
  }

  // Eq. 7-10.
  void run_prologue(const Sources& sources, const Prologue& x, const Prepared& prepared) const {
    const int64_t all = s.rows * H, state = int64_t(B) * H;
    of_sets(sources.one_input, [&](int g, int batch) {
      const Matrix &input = sources.input[g], &weight = sources.weight_f[g];
      const int64_t F = p.group[g].input_size;
      multiply(batch, s.rows, H, F, {input.p, input.stride, 0, false},
               {weight.p, weight.stride, H * F, true}, wide_at(x.a_f, g * all), H, all);
    });
    NormTanhArguments y{};
    y.norms = norm_table(prepared), y.dtype = s.operand, y.G = G, y.H = H, y.eps = p.eps;
    if (!s.has_context) {
      y.part[0] = {row_sizes(s.rows, first_reverse), gate_f, x.a_f, x.f_tilde,
                   x.f_tilde_stride_group};
      norm_tanh(y, stream);
      return;
    }
    of_sets(sources.one_context, [&](int g, int batch) {
      const Matrix &context = sources.context[g], &weight = sources.weight_g[g];
      const int64_t C = p.group[g].context_size;
      multiply(batch, B, H, C, {context.p, context.stride, B * C, false},
               {weight.p, weight.stride, H * C, true}, wide_at(x.a_g, g * state), H, state);
    });
    y.part[0] = {row_sizes(s.rows, G), gate_f, x.a_f, x.f_bar, all};
    y.part[1] = {row_sizes(B, G), gate_g, x.a_g, x.g_bar, state};
    norm_tanh(y, stream);
    const Matrix& weight = sources.weight_s;
    const int64_t batch_stride = 2 * int64_t(H) * H;
    multiply(G, s.rows, H, H, {x.f_bar, H, all, false},
             {weight.p, weight.stride, batch_stride, true}, x.a_s, H, all);
    multiply(G, B, H, H, {x.g_bar, H, state, false},
             {element(weight.p, s.operand, H), weight.stride, batch_stride, true}, x.context, H,
             state);
    MixArguments m = mix_arguments(x, prepared, int(s.rows));
    m.f_tilde = x.f_tilde, m.f_tilde_stride_group = x.f_tilde_stride_group;
    mix(m, stream);
  }

  NormTable norm_table(const Prepared& prepared) const { return {prepared.norms, s.has_context}; }

  // A block per row.
  RowSizes row_sizes(int64_t rows, int first_reverse) const {
    return {int(rows), int(rows), B, first_reverse};
  }

  MixArguments mix_arguments(const Prologue& x, const Prepared& prepared, int blocks) const {
    MixArguments m{};
    static_cast<RowSizes&>(m) = {int(s.rows), blocks, B, first_reverse};
    m.G = G, m.H = H;
    m.a = x.a_s, m.context = x.context, m.f_bar = x.f_bar, m.g_bar = x.g_bar;
    m.norms = norm_table(prepared);
    m.dtype = s.operand, m.mix = p.mix, m.eps = p.eps;
    return m;
  }

  static Copy whole(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t size) {
    return {from, to, 1, 1, size, 0, 0, 0, 0, nullptr, from_dtype, to_dtype, 0};
  }

  // W_r, W_z and W_h, from the first-th on, [count H, H] of each weight set.
  Operand gate_weights(const Prepared& prepared, int first, bool transposed) const {
    const int64_t size = int64_t(H) * H;
    return {at(prepared.matrices, first * size), H, step_gates * size, transposed};
  }

  const Problem& p;
  const PassPlan& plan;
  const Sizes s;
  const int G, T, B, H, first_reverse;
  const bool persistent, removes_mean;

 private:
  void* const products_;

 protected:
  void* const stream;
};

class ForwardPass : Pass {
 public:
  ForwardPass(const Problem& p, const PassPlan& plan, const Saved& saved, ForwardBuffers& buffers,
              void* stream)
      : Pass(p, plan, buffers.products, stream), b(buffers), saved(saved) {}

  void run(const Results& results) {
    std::vector<Copy>& copies = b.sources.copies;
    if (!persistent)
      copies.push_back({p.hx, b.operand, G, B, H, p.hx_stride_group, p.hx_stride_sample,
                        int64_t(B) * H, H, nullptr, s.operand, s.operand, 0});
    if (saved.rest) copies.push_back(whole(nullptr, s.operand, saved.rest, s.operand, 1));
    prepare(b.prepared, copies, false);
    run_prologue(b.sources, b.prologue, b.prepared);
    multiply(G, s.rows, step_gates * int64_t(H), H,
             {b.prologue.f_tilde, H, b.prologue.f_tilde_stride_group, false},
             gate_weights(b.prepared, 0, true), b.input_gates, step_gates * int64_t(H),
             step_gates * s.rows * H);
    if (persistent)
      run_persistent(results);
    else
      run_steps(results);
  }

 private:
  void run_persistent(const Results& results) const {
    ForwardArguments a{};
    a.weights = static_cast<const uint16_t*>(b.prepared.split_weights);
    a.input_gates = static_cast<const float*>(b.input_gates);
    a.norms = norm_table(b.prepared);
    a.hx = static_cast<const float*>(b.prepared.hx);
    a.lengths = p.lengths, a.first_reverse = first_reverse;
    a.output = results.output, a.output_stride = output_stride(results), a.h_n = results.h_n;
    a.states = static_cast<float*>(saved.states);
    a.packets = b.prepared.packets;
    a.G = G, a.T = T, a.B = B, a.H = H, a.eps = float(p.eps);
    recurrence(plan, plan.teams, a, true, stream);
  }

  void run_steps(const Results& results) const {
    const int64_t state = int64_t(B) * H, input_row = step_gates * int64_t(H);
    GateArguments a{};
    a.G = G, a.T = T, a.B = B, a.H = H, a.steps = 1;
    a.state[step_r] = {b.state_gates, 2 * state, 2 * int64_t(H)};
    a.state[step_z] = {wide_at(b.state_gates, H), 2 * state, 2 * int64_t(H)};
    a.state[step_h] = {b.candidate, state, H};
    a.norms = norm_table(b.prepared), a.hx = b.prepared.hx;
    a.lengths = p.lengths, a.first_reverse = first_reverse;
    a.states = saved.states ? saved.states : b.state;
    a.states_stride = saved.states ? Strides{s.rows * H, state, H} : Strides{state, 0, H};
    a.dtype = s.operand, a.eps = p.eps;
    a.r_h = b.r_h, a.r_h_stride_group = state;
    a.operand = b.operand, a.h_n = results.h_n;
    a.output = results.output, a.output_stride = output_stride(results);
    for (int t = 0; t < T; t++) {
      a.first_step = t;
      for (int gate = 0; gate < step_gates; gate++)
        a.input[gate] = {wide_at(b.input_gates, (int64_t(t) * B * step_gates + gate) * H),
                         s.rows * input_row, input_row};
      multiply(G, B, 2 * int64_t(H), H, {b.operand, H, state, false},
               gate_weights(b.prepared, step_r, true), b.state_gates, 2 * int64_t(H), 2 * state);
      reset_gate(a, stream);
      multiply(G, B, H, H, {b.r_h, H, state, false}, gate_weights(b.prepared, step_h, true),
               b.candidate, H, state);
      update_gate(a, stream);
    }
  }

  static Strides output_stride(const Results& results) {
    return {results.output_stride_group, results.output_stride_step, results.output_stride_sample};
  }

  ForwardBuffers& b;
  const Saved& saved;
};

class BackwardPass : Pass {
 public:
  BackwardPass(const Problem& p, const PassPlan& plan, const Cotangents& cotangents,
               const Saved& saved, const GroupGradient* gradient, void* grad_hx,
               BackwardBuffers& buffers, void* stream)
      : Pass(p, plan, buffers.products, stream),
        b(buffers),
        cotangents(filled(cotangents, buffers.zeros)),
        states(saved.states),
        gradient(gradient),
        grad_hx(grad_hx ? grad_hx : buffers.unwanted),
        needs_weights(gradient[0].weight[0]),
        needs_f(needs_weights || gradient[0].input),
        needs_g(s.has_context && (needs_weights || gradient[0].context)) {}

  void run() {
    prepare_all();
    if (p.keep != Keep::gates) run_prologue(b.sources, b.prologue, b.prepared);
    gates_again();
    if (persistent)
      run_persistent();
    else
      run_steps();
    if (needs_f || needs_g) prologue_backward();
    std::vector<Copy> copies;
    for (int g = 0; g < G; g++) {
      if (gradient[g].input)
        multiply(1, s.rows, p.group[g].input_size, H, {at(b.grad_a_f, g * all), H, 0, false},
                 {b.sources.weight_f[g].p, b.sources.weight_f[g].stride, 0, false},
                 gradient[g].input, p.group[g].input_size, 0, s.operand, s.operand);
    }
    if (s.has_context && gradient[0].context) context_gradients(copies);
    if (needs_weights) weight_gradients(copies);
    finish(copies);
  }

 private:
  // With a row of zeros in place of what is null.
  static Cotangents filled(Cotangents c, const void* zeros) {
    if (!c.grad_output)
      c.grad_output = zeros,
      c.grad_output_stride_group = c.grad_output_stride_step = c.grad_output_stride_sample = 0;
    if (!c.grad_h_n) c.grad_h_n = zeros, c.grad_h_n_stride_group = c.grad_h_n_stride_sample = 0;
    return c;
  }

  void prepare_all() {
    std::vector<Copy>& copies = b.sources.copies;
    if (cotangents.grad_output == b.zeros || cotangents.grad_h_n == b.zeros)
      copies.push_back(whole(nullptr, s.operand, b.zeros, s.operand, H));
    const int64_t table = step_gates * all;
    const Dtype operand = s.operand;
    // The state before each step.
    copies.push_back({p.hx, b.operands, G, B, H, p.hx_stride_group, p.hx_stride_sample, table, H,
                      nullptr, operand, operand, 0});
    if (T > 1)
      copies.push_back({states, at(b.operands, state), G, s.rows - B, H, all, H, table, H, nullptr,
                        s.wide, operand, 0});
    if (p.keep == Keep::gates)
      copies.push_back({b.prologue.f_tilde, at(b.operands, all), G, s.rows, H, all, H, table, H,
                        nullptr, operand, operand, 0});
    if (!persistent)
      copies.push_back({cotangents.grad_h_n == b.zeros ? nullptr : cotangents.grad_h_n, b.grad_h, G,
                        B, H, cotangents.grad_h_n_stride_group, cotangents.grad_h_n_stride_sample,
                        state, H, nullptr, operand, s.wide, 0});
    prepare(b.prepared, copies, true);
  }

  // The gates of all steps, from the states that forward left. W f_tilde and W h are summed apart,
  // as in forward, so that the sums have forward's errors.
  void gates_again() const {
    const int64_t table = step_gates * all, two = 2 * int64_t(H);
    GateArguments a{};
    a.G = G, a.T = T, a.B = B, a.H = H, a.steps = T;
    a.state[step_r] = {b.gate_products, 4 * all, two};
    a.state[step_z] = {wide_at(b.gate_products, H), 4 * all, two};
    a.input[step_r] = {wide_at(b.gate_products, 2 * all), 4 * all, two};
    a.input[step_z] = {wide_at(b.gate_products, 2 * all + H), 4 * all, two};
    a.input[step_h] = {b.candidate_products, 2 * all, H};
    a.state[step_h] = {wide_at(b.candidate_products, all), 2 * all, H};
    a.f_tilde = {at(b.operands, all), table, H};
    a.norms = norm_table(b.prepared), a.hx = b.prepared.hx;
    a.states = states, a.states_stride = {all, state, H};
    a.dtype = s.operand, a.eps = p.eps;
    a.r_h = at(b.operands, 2 * all), a.r_h_stride_group = table;
    a.x_hat = b.x_hat, a.r_std = b.r_std;
    a.x_hat_operand = b.x_hat == b.operands ? nullptr : b.operands;
    a.weight_operands = b.weight_operands;
    multiply(G, 2 * s.rows, two, H, {b.operands, H, table, false},
             gate_weights(b.prepared, step_r, true), b.gate_products, two, 4 * all);
    reset_gate(a, stream);
    multiply(G, 2 * s.rows, H, H, {a.f_tilde.p, H, table, false},
             gate_weights(b.prepared, step_h, true), b.candidate_products, H, 2 * all);
    update_gate(a, stream);
  }

  void run_persistent() const {
    const int64_t size = int64_t(H) * H;
    if (s.has_norm)
      multiply(int64_t(G) * step_gates, s.rows, H, H, {b.operands, H, all, false},
               {b.prepared.matrices, H, size, false}, b.projected, H, all);
    BackwardArguments a{};
    a.weights = static_cast<const uint16_t*>(b.prepared.split_weights);
    a.x_hat = static_cast<const float*>(b.x_hat);
    a.projected = static_cast<const float*>(s.has_norm ? b.projected : nullptr);
    a.r_std = static_cast<const float*>(b.r_std);
    a.norms = norm_table(b.prepared);
    a.states = static_cast<const float*>(states), a.hx = static_cast<const float*>(b.prepared.hx);
    a.lengths = p.lengths, a.first_reverse = first_reverse;
    a.grad_output = cotangents.grad_output, a.grad_output_stride = output_stride();
    a.grad_h_n = cotangents.grad_h_n;
    a.grad_h_n_stride_group = cotangents.grad_h_n_stride_group;
    a.grad_h_n_stride_sample = cotangents.grad_h_n_stride_sample;
    a.grad_gates = b.grad_gates, a.grad_f_tilde = static_cast<float*>(b.grad_f_tilde);
    a.grad_hx = grad_hx, a.grad_norm = static_cast<float*>(b.grad_norm_recurrence);
    a.packets = b.prepared.packets, a.dtype = s.operand;
    a.G = G, a.T = T, a.B = B, a.H = H;
    recurrence_backward(plan, plan.teams, a, true, stream);
  }

  void run_steps() const {
    const int64_t row = step_gates * int64_t(H), set = step_gates * state;
    GateBackwardArguments a{};
    a.G = G, a.T = T, a.B = B, a.H = H;
    a.x_hat = b.x_hat, a.r_std = b.r_std, a.norms = norm_table(b.prepared), a.states = states;
    a.hx = b.prepared.hx, a.lengths = p.lengths, a.first_reverse = first_reverse;
    a.grad_output = cotangents.grad_output, a.grad_output_stride = output_stride();
    a.dtype = s.operand, a.grad_r_h = b.grad_r_h, a.grad_sum = b.grad_sum;
    a.carry = b.carry, a.grad_h = b.grad_h, a.grad_hx = grad_hx, a.grad_gates = b.grad_gates;
    a.operand = b.step_operand, a.grad_f_tilde = b.grad_f_tilde;
    a.grad_norm = b.grad_norm_recurrence;
    for (a.step = T - 1; a.step >= 0; a.step--) {
      update_gate_backward(a, stream);
      multiply(G, B, H, H, {at(b.step_operand, 2 * int64_t(H)), row, set, false},
               gate_weights(b.prepared, step_h, false), b.grad_r_h, H, state);
      reset_gate_backward(a, stream);
      multiply(G, B, H, 2 * int64_t(H), {b.step_operand, row, set, false},
               gate_weights(b.prepared, step_r, false), b.grad_sum, H, state);
    }
    update_gate_backward(a, stream);
  }

  // The gradients of Eq. 10 to 7, down to da_f and da_g.
  void prologue_backward() const {
    const auto blocks = [&](int gate) { return int(BackwardBuffers::summands(s, gate)); };
    NormTanhBackwardArguments y{};
    // grad_f has the order of the run where it is f_tilde's gradient.
    y.part[0] = {{int(s.rows), needs_f ? blocks(gate_f) : 0, B, s.has_context ? G : first_reverse},
                 gate_f,
                 b.prologue.a_f,
                 b.grad_f,
                 b.grad_f_bar,
                 b.grad_a_f,
                 b.grad_norm[gate_f]};
    y.norms = norm_table(b.prepared), y.dtype = s.operand, y.G = G, y.H = H, y.eps = p.eps;
    if (s.has_context) {
      mix_and_g_backward();
      y.part[1] =
          {{B, needs_g ? blocks(gate_g) : 0, B, G}, gate_g,     b.prologue.a_g,     b.grad_g,
           b.grad_g_bar ? b.grad_g_sum : nullptr,   b.grad_a_g, b.grad_norm[gate_g]};
    }
    norm_tanh_backward(y, stream);
  }

  // Those of f_bar and g_bar.
  void mix_and_g_backward() const {
    MixArguments m =
        mix_arguments(b.prologue, b.prepared, int(BackwardBuffers::summands(s, gate_s)));
    m.grad_f_tilde = b.grad_f_tilde, m.grad_a = b.grad_a_s, m.grad_norm = b.grad_norm[gate_s];
    m.grad_f_bar = b.grad_f_bar, m.grad_g_bar = b.grad_g_bar;
    mix_backward(m, stream);
    const Matrix &weight_s = b.sources.weight_s, &weight_sg = b.sources.wide_weight_sg;
    if (needs_g) {
      StepSumArguments sums{};
      sums.G = G, sums.T = T, sums.B = B, sums.H = H, sums.dtype = s.operand;
      sums.grad_a = b.grad_a_s, sums.grad_g_bar = b.grad_g_bar;
      sums.grad_a_sum = b.grad_a_s_sum, sums.grad_g_bar_sum = b.grad_g_sum;
      step_sum(sums, stream);
    }
    if (needs_f)
      multiply(G, s.rows, H, H, {b.grad_a_s, H, all, false},
               {weight_s.p, weight_s.stride, H * weight_s.stride, false}, b.grad_f, H, all);
    // In the wide dtype: a sum over the steps may be too large for float16.
    if (needs_g)
      multiply(G, B, H, H, {b.grad_a_s_sum, H, state, false},
               {weight_sg.p, weight_sg.stride, H * weight_sg.stride, false}, b.grad_g, H, state,
               s.wide, s.wide);
  }

  void context_gradients(std::vector<Copy>& copies) const {
    of_sets(b.sources.one_context, [&](int g, int batch) {
      const int64_t C = p.group[g].context_size;
      void* const target = b.grad_contexts ? b.grad_contexts : gradient[g].context;
      const Matrix& weight = b.sources.weight_g[g];
      multiply(batch, B, C, H, {at(b.grad_a_g, g * state), H, state, false},
               {weight.p, weight.stride, H * C, false}, target, C, B * C, s.operand, s.operand);
    });
    if (!b.grad_contexts) return;
    const int64_t size = B * p.group[0].context_size;
    for (int g = 0; g < G; g++)
      copies.push_back(
          whole(at(b.grad_contexts, g * size), s.operand, gradient[g].context, s.operand, size));
  }

  void weight_gradients(std::vector<Copy>& copies) const {
    const int64_t two = 2 * int64_t(H), size = int64_t(H) * H;
    of_sets(b.sources.one_input, [&](int g, int batch) {
      const Matrix& input = b.sources.input[g];
      const int64_t F = p.group[g].input_size;
      void* const there = b.grad_weight_f[g];
      multiply(batch, H, F, s.rows, {at(b.grad_a_f, g * all), H, all, true},
               {input.p, input.stride, 0, false}, there ? there : gradient[g].weight[gate_f], F,
               H * F, s.operand, there ? s.wide : p.weight_dtype);
    });
    for (int g = 0; g < G; g++)
      if (b.grad_weight_f[g])
        copies.push_back(whole(b.grad_weight_f[g], s.wide, gradient[g].weight[gate_f],
                               p.weight_dtype, H * p.group[g].input_size));
    if (s.has_context) {
      void* const there = b.grad_weight_sf;
      multiply(G, H, H, s.rows, {b.grad_a_s, H, all, true}, {b.prologue.f_bar, H, all, false},
               there ? there : gradient[0].weight[gate_s], there ? H : two, size, s.operand,
               there ? s.wide : p.weight_dtype);
      for (int g = 0; there && g < G; g++)
        copies.push_back({wide_at(there, g * size), gradient[g].weight[gate_s], 1, H, H, 0, H, 0,
                          two, nullptr, s.wide, p.weight_dtype, 0});
    }
    multiply(int64_t(G) * step_gates, H, H, s.rows, {b.grad_gates, H, all, true},
             {b.weight_operands, H, all, false}, b.grad_matrices, H, size);
  }

  void finish(const std::vector<Copy>& copies) const {
    if (copies.empty() && !needs_weights) return;
    FinishArguments a{};
    a.weight_dtype = p.weight_dtype, a.norm_dtype = p.norm_dtype;
    a.grad_a_g = b.grad_a_g, a.grad_a_s_sum = b.grad_a_s_sum, a.g_bar = b.prologue.g_bar;
    a.matrices = b.grad_matrices, a.remove_mean = removes_mean;
    for (int gate = gate_f; gate < gate_r; gate++) {
      a.prologue[gate] = b.grad_norm[gate];
      a.prologue_summands[gate] = int(BackwardBuffers::summands(s, gate));
    }
    a.recurrence = b.grad_norm_recurrence, a.recurrence_summands = B;
    a.has_context = s.has_context;
    a.G = G, a.B = B, a.H = H, a.operand = s.operand, a.dtype = s.wide;
    in_launches(a, copies, needs_weights ? G : 0, [&](int first, int count) {
      a.first = first, a.count = count, a.most_context_size = 0;
      for (int i = 0; i < count; i++) {
        const GroupGradient& grad = gradient[first + i];
        if (s.has_context) {
          const Matrix& context = b.sources.context[first + i];
          a.context[i] = context.p, a.context_stride[i] = context.stride;
          a.context_size[i] = p.group[first + i].context_size;
          a.most_context_size = std::max(a.most_context_size, int(a.context_size[i]));
          a.weight_g[i] = grad.weight[gate_g], a.weight_s[i] = grad.weight[gate_s];
        }
        std::copy_n(grad.weight + gate_r, step_gates, a.weight[i]);
        a.norm[i][0] = grad.norm_weight, a.norm[i][1] = grad.norm_bias;
      }
      cuda::finish(a, stream);
    });
  }

  Strides output_stride() const {
    return {cotangents.grad_output_stride_group, cotangents.grad_output_stride_step,
            cotangents.grad_output_stride_sample};
  }

  BackwardBuffers& b;
  const Cotangents cotangents;
  void* const states;
  const GroupGradient* const gradient;
  void* const grad_hx;
  const bool needs_weights, needs_f, needs_g;              // da_f and da_g
  const int64_t all = s.rows * H, state = int64_t(B) * H;  // elements of [T, B, H] and [B, H]
};

}  // namespace

void check(const Problem& p) {
  require(p.groups > 0 && p.steps > 0 && p.batch > 0 && p.hidden > 0,
          "groups, steps, batch and hidden must be positive");
  for (int64_t g = 0; g < p.groups; g++)
    require(p.group[g].input_size > 0 && (p.group[g].context_size > 0) == p.has_context,
            "input_size must be positive, as context_size with a context; without one it is 0");
  for (int64_t g = 0; g < p.groups; g++)
    require(!p.group[g].share, "a context's share must be null: the CPU engine alone takes it");
  require(p.dtype != Dtype::int8, "dtype must be float32, float64, bfloat16 or float16");
  for (const Dtype stored : {p.weight_dtype, p.norm_dtype})
    require(stored == p.dtype || (stored == Dtype::bfloat16 && p.dtype == Dtype::float32),
            "weight_dtype and norm_dtype must be dtype, or bfloat16 where that is float32");
  for (int64_t g = first_reverse(p); g < p.groups; g++)
    require(p.group[g].reverse, "groups that run in reverse must be the last ones");
  // Rows, and blocks of up to two kinds of rows, are counted by ints.
  const double rows = double(p.groups) * p.steps * p.batch;
  for (int64_t g = 0; g < p.groups; g++)
    require(p.group[g].context_size < 1 << 24, "context_size must be less than 2^24");
  require(p.hidden < 1 << 24 && 2 * rows < INT_MAX &&
              double(p.groups) * p.batch * p.hidden < INT_MAX,
          "groups * steps * batch must be less than 2^30, groups * batch * hidden less than 2^31 "
          "and hidden less than 2^24");
}

int64_t saved_size(const Problem& p) {
  check(p);
  return Saved(nullptr, p).size;
}

int64_t forward_workspace_size(const Problem& p, const PassPlan& plan) {
  check(p);
  return ForwardBuffers(nullptr, p, plan, Saved(nullptr, p)).arena.size();
}

int64_t backward_workspace_size(const Problem& p, const PassPlan& plan, bool need_weights) {
  check(p);
  return BackwardBuffers(nullptr, p, plan, Saved(nullptr, p), need_weights).arena.size();
}

void forward(const Problem& p, const PassPlan& plan, const Results& results, void* saved_memory,
             void* workspace, void* stream) {
  check(p);
  require(plan.path == Path::step || p.dtype == (plan.terms > 1 ? Dtype::float32 : plan.term_dtype),
          "with several terms dtype must be float32, else the terms' dtype");
  const Saved saved(saved_memory, p);
  ForwardBuffers buffers(workspace, p, plan, saved);
  ForwardPass(p, plan, saved, buffers, stream).run(results);
}

void backward(const Problem& p, const PassPlan& plan, const Cotangents& cotangents,
              const void* saved_memory, const GroupGradient* gradient, void* grad_hx,
              void* workspace, void* stream) {
  check(p);
  require(plan.path == Path::step || p.dtype != Dtype::float64, "float64 needs path step");
  const Saved saved(saved_memory, p);
  BackwardBuffers buffers(workspace, p, plan, saved, gradient[0].weight[0]);
  BackwardPass(p, plan, cotangents, saved, gradient, grad_hx, buffers, stream).run();
}

}  // namespace mmixer::cuda
