// Backward: the recurrence in reverse, then the mix and the projections of all steps at once, then
// the weight gradients as one product over T x B each.
//
// A step has two dependent products: W_h^T da_h gives dv (v = r h + f_tilde), then W_r^T da_r +
// W_z^T da_z gives du (u = f_tilde + h). Where forward saved only the states, the gates of all steps
// are computed again first, to the same bits. Gradients of scale and shift are summed for each sample
// on its own and then over samples: no order depends on the threads. Bound: as forward.
#pragma once

#include "forward.h"

namespace mmixer::cpu::MMIXER_ISA {

// Everything that backward's phases share.
template <class T>
struct Backward {
  const Problem<T>& p;
  const Schedule& schedule;
  const Saved<T>& saved;
  const BackwardBuffers<T>& b;
  const ForwardBuffers<T>* again;  // where the gates are computed again
  Rows<T> grad_output, grad_h_n;
  const GroupGradient<T>* gradient;
  T* grad_hx;
  int64_t H_;

  const T* x_hat(Gate gate, int64_t g, int64_t row) const { return saved.x_hat[gate](g, row); }
  T r_std(Gate gate, int64_t g, int64_t row) const { return saved.r_std[gate](g, 0)[row]; }

  // The state that step t began with.
  const T* h_before(int64_t g, int64_t t, int64_t rank) const {
    return t == 0 ? b.h_0(g, rank) : saved.h(g, schedule.first_row[t - 1] + rank);
  }

  // dy becomes da, in place.
  void through_norm(Gate gate, T* dy, int64_t g, int64_t row, int64_t rank) const {
    normalize_backward(b.norms(g, gate), dy, x_hat(gate, g, row), r_std(gate, g, row),
                       b.norm_gradient(g, rank, gate, 0), b.norm_gradient(g, rank, gate, 1), H_);
  }
};

// x_hat and r_std of all gates from the states, in forward's own order; ends with a barrier.
template <class T>
void compute_gates_again(Member& member, const Backward<T>& c) {
  const Problem<T>& p = c.p;
  const Schedule& schedule = c.schedule;
  const ForwardBuffers<T>& f = *c.again;
  const Table<T>& operand = c.b.da_r;  // u, then v: not in use yet
  const int64_t rows = schedule.rows();
  const auto each_row = [&](auto body) {
    for (int64_t i = member.begin(p.groups * rows); i < member.end(p.groups * rows); i++) {
      const int64_t g = i / rows, row = i % rows, rank = schedule.rank_of_row(row);
      body(g, row, c.h_before(g, schedule.step_of_row[row], rank), f.f_tilde(g, row),
           operand(g, row));
    }
    member.barrier();
  };
  const auto product = [&](Gate gate, const void* Group<T>::*weight, const Panels<T>& panels) {
    for (int64_t g = 0; g < p.groups; g++)
      project<T>(
          member, p, [&](int64_t row) { return operand(g, row); }, rows, p.group[g].*weight, c.H_,
          c.H_, panels(g), [&](int64_t row) { return f.x_hat[gate](g, row); });
  };
  f.norms.fill(member, p);
  pack_weights(member, p, f);
  member.barrier();
  forward_mix(member, p, schedule, f);
  each_row([&](int64_t, int64_t, const T* h, const T* f_tilde, T* u) {
    for (int64_t j = 0; j < c.H_; j += lanes<T>) store(u + j, load(f_tilde + j) + load(h + j));
  });
  product(R, &Group<T>::weight_r, f.weight_r);
  product(Z, &Group<T>::weight_z, f.weight_z);
  member.barrier();
  each_row([&](int64_t g, int64_t row, const T* h, const T* f_tilde, T* v) {
    T *x_r = f.x_hat[R](g, row), *x_z = f.x_hat[Z](g, row);
    const Statistics<T> of_r = f.statistics(R, g, row, p), of_z = f.statistics(Z, g, row, p);
    const Norm<T> norm = f.norms(g, R);
    for (int64_t j = 0; j < c.H_; j += lanes<T>) {
      const Vector<T> r = sigmoid(norm(of_r.normalize(x_r, j), j));
      of_z.normalize(x_z, j);
      store(v + j, r * load(h + j) + load(f_tilde + j));
    }
  });
  product(H, &Group<T>::weight_h, f.weight_h);
  member.barrier();
  each_row([&](int64_t g, int64_t row, const T*, const T*, T*) {
    const Statistics<T> of_h = f.statistics(H, g, row, p);
    for (int64_t j = 0; j < c.H_; j += lanes<T>) of_h.normalize(f.x_hat[H](g, row), j);
  });
}

// Packed weights, states and mixed features that the phases read; ends with a barrier.
template <class T>
void backward_prepare(Member& member, const Backward<T>& c) {
  const Problem<T>& p = c.p;
  const Schedule& schedule = c.schedule;
  const BackwardBuffers<T>& b = c.b;
  const GroupGradient<T>* gradient = c.gradient;
  const int64_t H_ = c.H_;
  b.norms.fill(member, p);
  for (int64_t g = 0; g < p.groups; g++) {
    const Group<T>& group = p.group[g];
    const auto packed = [&](const void* weight, int64_t first, int64_t stride, int64_t columns,
                            const Panels<T>& panels) {
      with_stored<T>(p.bfloat16_weights, weight, [&](const auto* w) {
        const auto row = [&](int64_t k) {
          return [=, x = w + first + k * stride](int64_t n) { return load(x + n, columns - n); };
        };
        pack_rows<T>(member, row, H_, columns, panels(g));
      });
    };
    if (gradient[g].input)
      packed(group.weight_f, 0, group.input_size, group.input_size, b.weight_f);
    packed(group.weight_g, 0, group.context_size, group.context_size, b.weight_g);
    packed(group.weight_s, 0, 2 * H_, H_, b.weight_sf);
    packed(group.weight_s, H_, 2 * H_, H_, b.weight_sg);
    packed(group.weight_r, 0, H_, H_, b.weight_r);
    packed(group.weight_z, 0, H_, H_, b.weight_z);
    packed(group.weight_h, 0, H_, H_, b.weight_h);
  }
  for (int64_t i = member.begin(p.groups * p.batch); i < member.end(p.groups * p.batch); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    const T* h_0 =
        p.hx ? p.hx + g * p.hx_stride_group + schedule.sample[rank] * p.hx_stride_sample : nullptr;
    T* h = b.h_0(g, rank);
    for (int64_t j = 0; j < H_; j += lanes<T>)
      store(h + j, h_0 ? load(h_0 + j, H_ - j) : Vector<T>{});
    for (int gate = 0; gate < gates; gate++)
      for (int which : {0, 1})
        std::fill_n(b.norm_gradient(g, rank, Gate(gate), which), b.norm_grad.width, T(0));
    std::fill_n(b.dh(g, rank), b.dh.width, T(0));
    std::fill_n(b.dg(g, rank), b.dg.width, T(0));
    std::fill_n(b.da_s_sum(g, rank), b.da_s_sum.width, T(0));
  }
  member.barrier();
  if (c.again) compute_gates_again(member, c);
  for (int64_t i = member.begin(p.groups * p.batch); i < member.end(p.groups * p.batch); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    const Norm<T> norm = b.norms(g, G);
    for (int64_t j = 0; j < H_; j += lanes<T>)
      store(b.g_bar(g, rank) + j, tanh(norm(c.x_hat(G, g, rank), j)));
  }
  member.barrier();
  const int64_t rows = schedule.rows();
  for (int64_t i = member.begin(p.groups * rows); i < member.end(p.groups * rows); i++) {
    const int64_t g = i / rows, row = i % rows;
    const Norm<T> norm_f = b.norms(g, F), norm_s = b.norms(g, S);
    const T* g_bar = b.g_bar(g, schedule.rank_of_row(row));
    for (int64_t j = 0; j < H_; j += lanes<T>) {
      const Vector<T> y = norm_s(c.x_hat(S, g, row), j);
      store(b.f_tilde(g, row) + j,
            p.mix == Mix::concat ? y
                                 : interpolate(sigmoid(y), tanh(norm_f(c.x_hat(F, g, row), j)),
                                               load(g_bar + j)));
    }
  }
  member.barrier();
}

template <class T>
void backward_recurrence(Member& member, const Backward<T>& c, const Slice* slices,
                         int64_t count) {
  const Problem<T>& p = c.p;
  const Schedule& schedule = c.schedule;
  const BackwardBuffers<T>& b = c.b;
  const int64_t H_ = c.H_;

  // dL/dh_t from step t + 1, and df_tilde of that step, once its du is there.
  const auto finish_step = [&](int64_t t, int64_t g, int64_t rank) {
    const T *dv = b.dv(g, rank), *du = b.du(g, rank), *r = b.r(g, rank);
    T *dh = b.dh(g, rank), *df = b.df(g, schedule.first_row[t] + rank);
    for (int64_t j = 0; j < H_; j += lanes<T>) {
      const Vector<T> through_u = load(du + j), through_v = load(dv + j);
      store(df + j, through_v + through_u);
      store(dh + j, load(dh + j) + through_v * load(r + j) + through_u);
    }
  };
  const auto product = [&](const Table<T>& da, const Panels<T>& weight, const Table<T>& target,
                           int64_t t, bool accumulate) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t g = slices[i].group, begin = slices[i].begin;
      gemm<T>(
          member, [&](int64_t m) { return da(g, schedule.first_row[t] + begin + m); }, 1,
          slices[i].active(schedule, t), weight(g), H_, H_,
          [&](int64_t m) { return target(g, begin + m); }, accumulate);
    }
  };

  for (int64_t t = p.steps - 1; t >= 0; t--) {
    each_active(member, slices, count, schedule, t, [&](const Slice& slice, int64_t rank) {
      const int64_t g = slice.group, row = schedule.first_row[t] + rank;
      const int64_t sample = schedule.sample[rank];
      const bool is_last = rank >= schedule.active(t + 1);
      if (!is_last) finish_step(t + 1, g, rank);
      const T* d_out = c.grad_output.data + g * c.grad_output.stride_group +
                       t * c.grad_output.stride_step + sample * c.grad_output.stride_sample;
      const T* d_last =
          c.grad_h_n.data + g * c.grad_h_n.stride_group + sample * c.grad_h_n.stride_sample;
      const T *x_z = c.x_hat(Z, g, row), *x_h = c.x_hat(H, g, row);
      const T *x_r = c.x_hat(R, g, row), *h = c.h_before(g, t, rank);
      const Norm<T> norm_r = b.norms(g, R), norm_z = b.norms(g, Z), norm_h = b.norms(g, H);
      T *dh = b.dh(g, rank), *r = b.r(g, rank), *dy_z = b.da_z(g, row), *dy_h = b.da_h(g, row);
      for (int64_t j = 0; j < H_; j += lanes<T>) {
        const Vector<T> z = sigmoid(norm_z(x_z, j)), h_tilde = tanh(norm_h(x_h, j));
        Vector<T> d = load(dh + j) + load(d_out + j, H_ - j);
        if (is_last) d += load(d_last + j, H_ - j);
        store(dy_z + j, sigmoid_backward<Vector<T>>(d * (h_tilde - load(h + j)), z));
        store(dy_h + j, tanh_backward<Vector<T>>(d * z, h_tilde));
        store(r + j, sigmoid(norm_r(x_r, j)));
        store(dh + j, d - d * z);
      }
      c.through_norm(Z, dy_z, g, row, rank);
      c.through_norm(H, dy_h, g, row, rank);
    });
    member.barrier();
    product(b.da_h, b.weight_h, b.dv, t, false);
    member.barrier();
    each_active(member, slices, count, schedule, t, [&](const Slice& slice, int64_t rank) {
      const int64_t g = slice.group, row = schedule.first_row[t] + rank;
      const T *dv = b.dv(g, rank), *h = c.h_before(g, t, rank), *r = b.r(g, rank);
      T* dy_r = b.da_r(g, row);
      for (int64_t j = 0; j < H_; j += lanes<T>)
        store(dy_r + j, sigmoid_backward<Vector<T>>(load(dv + j) * load(h + j), load(r + j)));
      c.through_norm(R, dy_r, g, row, rank);
    });
    member.barrier();
    product(b.da_r, b.weight_r, b.du, t, false);
    product(b.da_z, b.weight_z, b.du, t, true);
    member.barrier();
  }
  each_active(member, slices, count, schedule, 0, [&](const Slice& slice, int64_t rank) {
    finish_step(0, slice.group, rank);
    T* d_hx = c.grad_hx + (slice.group * p.batch + schedule.sample[rank]) * H_;
    for (int64_t j = 0; j < H_; j += lanes<T>)
      store(d_hx + j, load(b.dh(slice.group, rank) + j), H_ - j);
  });
}

// From df_tilde to da_s, da_f, da_g and the gradients of input and context.
template <class T>
void backward_mix(Member& member, const Backward<T>& c) {
  const Problem<T>& p = c.p;
  const Schedule& schedule = c.schedule;
  const BackwardBuffers<T>& b = c.b;
  const GroupGradient<T>* gradient = c.gradient;
  const int64_t H_ = c.H_;
  const int64_t states = p.groups * p.batch, rows = schedule.rows();

  for (int64_t i = member.begin(states); i < member.end(states); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    const Norm<T> norm_f = b.norms(g, F), norm_s = b.norms(g, S);
    T *dg = b.dg(g, rank), *sum = b.da_s_sum(g, rank);
    const T* g_bar = b.g_bar(g, rank);
    for (int64_t t = 0; t < schedule.length[rank]; t++) {
      const int64_t row = schedule.first_row[t] + rank;
      const T *x_f = c.x_hat(F, g, row), *x_s = c.x_hat(S, g, row);
      T *df = b.df(g, row), *dy_s = b.da_s(g, row);
      for (int64_t j = 0; j < H_; j += lanes<T>) {
        const Vector<T> d = load(df + j);
        if (p.mix == Mix::concat) {
          store(dy_s + j, d);
          store(df + j, Vector<T>{});
        } else {
          const Vector<T> s = sigmoid(norm_s(x_s, j)), f_bar = tanh(norm_f(x_f, j));
          store(dy_s + j, sigmoid_backward<Vector<T>>(d * (f_bar - load(g_bar + j)), s));
          store(df + j, d * s);
          store(dg + j, load(dg + j) + (d - d * s));
        }
      }
      c.through_norm(S, dy_s, g, row, rank);
      for (int64_t j = 0; j < H_; j += lanes<T>) store(sum + j, load(sum + j) + load(dy_s + j));
    }
  }
  member.barrier();
  for (int64_t g = 0; g < p.groups; g++) {
    gemm<T>(
        member, [&](int64_t row) { return b.da_s(g, row); }, 1, rows, b.weight_sf(g), H_, H_,
        [&](int64_t row) { return b.df(g, row); }, true);
    gemm<T>(
        member, [&](int64_t rank) { return b.da_s_sum(g, rank); }, 1, p.batch, b.weight_sg(g), H_,
        H_, [&](int64_t rank) { return b.dg(g, rank); }, true);
  }
  member.barrier();
  for (int64_t i = member.begin(states); i < member.end(states); i++) {
    const int64_t g = i / p.batch, rank = i % p.batch;
    const auto project = [&](Gate gate, T* d, int64_t row) {
      const Norm<T> norm = b.norms(g, gate);
      for (int64_t j = 0; j < H_; j += lanes<T>)
        store(d + j, tanh_backward<Vector<T>>(load(d + j), tanh(norm(c.x_hat(gate, g, row), j))));
      c.through_norm(gate, d, g, row, rank);
    };
    for (int64_t t = 0; t < schedule.length[rank]; t++) {
      const int64_t row = schedule.first_row[t] + rank;
      project(F, b.df(g, row), row);
    }
    project(G, b.dg(g, rank), rank);
  }
  member.barrier();
  for (int64_t g = 0; g < p.groups; g++) {
    const Group<T>& group = p.group[g];
    const int64_t D = group.input_size, C = group.context_size;
    if (T* d_input = gradient[g].input) {
      gemm<T>(
          member, [&](int64_t row) { return b.df(g, row); }, 1, rows, b.weight_f(g), D, H_,
          [&](int64_t row) {
            const int64_t sample = schedule.sample[schedule.rank_of_row(row)];
            return d_input + (schedule.step_of_row[row] * p.batch + sample) * D;
          });
      for (int64_t rank = member.begin(p.batch); rank < member.end(p.batch); rank++)
        for (int64_t t = schedule.length[rank]; t < p.steps; t++)
          std::fill_n(d_input + (t * p.batch + schedule.sample[rank]) * D, D, T(0));
    }
    gemm<T>(
        member, [&](int64_t rank) { return b.dg(g, rank); }, 1, p.batch, b.weight_g(g), C, H_,
        [&](int64_t rank) { return gradient[g].context + schedule.sample[rank] * C; });
  }
}

// target[i][j] = sum over rows m of da(m)[i] * x(m)[j], i < H, j < columns. x(m)(j) is the vector of a
// row's elements from j on.
template <class T, class RowsDa, class RowsX>
void weight_gradient(Member& member, const BackwardBuffers<T>& b, RowsDa da, RowsX x, int64_t rows,
                     int64_t H_, int64_t columns, T* target, int64_t target_stride) {
  for (int64_t first = 0; first < rows; first += reduction_rows) {
    const int64_t count = std::min(reduction_rows, rows - first);
    const auto da_row = [&](int64_t m) {
      return [row = da(first + m)](int64_t j) { return load(row + j); };
    };
    pack_rows<T>(member, da_row, count, H_, b.left);
    pack_rows<T>(member, [&](int64_t m) { return x(first + m); }, count, columns, b.right);
    member.barrier();
    gemm<T>(
        member,
        [&](int64_t i) { return b.left + i / lanes<T> * panel_size<T>(count) + i % lanes<T>; },
        lanes<T>, H_, b.right, columns, count,
        [&](int64_t i) { return target + i * target_stride; }, first > 0);
    member.barrier();
  }
}

template <class T>
void backward_weights(Member& member, const Backward<T>& c) {
  const Problem<T>& p = c.p;
  const Schedule& schedule = c.schedule;
  const BackwardBuffers<T>& b = c.b;
  const int64_t H_ = c.H_;
  const int64_t rows = schedule.rows();
  for (int64_t g = 0; g < p.groups; g++) {
    const Group<T>& group = p.group[g];
    const GroupGradient<T>& grad = c.gradient[g];
    const auto h_row = [&](int64_t row) {
      return c.h_before(g, schedule.step_of_row[row], schedule.rank_of_row(row));
    };
    const auto u = [&](int64_t row) {
      return [h = h_row(row), f = b.f_tilde(g, row)](int64_t j) { return load(f + j) + load(h + j); };
    };
    const auto v = [&](int64_t row) {
      return [h = h_row(row), f = b.f_tilde(g, row), x_hat = c.x_hat(R, g, row),
              norm = b.norms(g, R)](int64_t j) {
        return sigmoid(norm(x_hat, j)) * load(h + j) + load(f + j);
      };
    };
    const auto f_bar = [&](int64_t row) {
      return [x_hat = c.x_hat(F, g, row), norm = b.norms(g, F)](int64_t j) {
        return tanh(norm(x_hat, j));
      };
    };
    const auto input = [&](int64_t row) {
      const int64_t sample = schedule.sample[schedule.rank_of_row(row)];
      return [x = group.input + schedule.step_of_row[row] * group.input_stride_step +
                  sample * group.input_stride_sample,
              D = group.input_size](int64_t j) { return load(x + j, D - j); };
    };
    const auto context = [&](int64_t rank) {
      return [x = group.context + schedule.sample[rank] * group.context_stride_sample,
              C = group.context_size](int64_t j) { return load(x + j, C - j); };
    };
    const auto g_bar = [&](int64_t rank) {
      return [x = b.g_bar(g, rank)](int64_t j) { return load(x + j); };
    };
    const auto gradient_of = [&](T* target, int64_t stride, const Table<T>& da, int64_t count,
                                 auto x, int64_t columns) {
      weight_gradient<T>(
          member, b, [&](int64_t m) { return da(g, m); }, x, count, H_, columns, target, stride);
    };
    gradient_of(grad.weight_r, H_, b.da_r, rows, u, H_);
    gradient_of(grad.weight_z, H_, b.da_z, rows, u, H_);
    gradient_of(grad.weight_h, H_, b.da_h, rows, v, H_);
    gradient_of(grad.weight_s, 2 * H_, b.da_s, rows, f_bar, H_);
    gradient_of(grad.weight_s + H_, 2 * H_, b.da_s_sum, p.batch, g_bar, H_);
    gradient_of(grad.weight_f, group.input_size, b.df, rows, input, group.input_size);
    gradient_of(grad.weight_g, group.context_size, b.dg, p.batch, context, group.context_size);
    if (!b.norms.enabled) continue;
    for (int64_t i = member.begin(gates * 2); i < member.end(gates * 2); i++) {
      T* target = (i % 2 ? grad.norm_bias : grad.norm_weight) + i / 2 * H_;
      for (int64_t j = 0; j < H_; j += lanes<T>) {
        Vector<T> total{};
        for (int64_t rank = 0; rank < p.batch; rank++)
          total += load(b.norm_gradient(g, rank, Gate(i / 2), int(i % 2)) + j);
        store(target + j, total, H_ - j);
      }
    }
  }
}

template <class T>
void backward_team(Member& member, const Backward<T>& c) {
  backward_prepare(member, c);
  share_samples(member, c.p, [&](Member& team, const Slice* slices, int64_t count) {
    backward_recurrence(team, c, slices, count);
  });
  member.barrier();
  backward_mix(member, c);
  member.barrier();
  if (c.gradient[0].weight_f) backward_weights(member, c);
}

}  // namespace mmixer::cpu::MMIXER_ISA
