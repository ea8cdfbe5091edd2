// Equations 7-10 and their gradients, between the products with W_f, W_g and W_s.
#pragma once

#include "order.h"
#include "rows.h"

namespace mmixer::cuda {

// A block's share of the rows of G weight sets.
struct Share {
  const int block, group;  // the block's number among those of the same rows; its weight set
  const bool reverse;      // which runs in reverse
  const RowSizes& rows;
  const int H;

  MMIXER_DEVICE Share(int block, const RowSizes& rows, int H)
      : block(block),
        group(block / rows.blocks),
        reverse(group >= rows.first_reverse),
        rows(rows),
        H(H) {}

  // Calls f(row, offset) with a row's number and the element at which it begins.
  template <class F>
  MMIXER_DEVICE void each_row(F f) const {
    for (int row = block % rows.blocks; row < rows.rows; row += rows.blocks)
      f(row, (int64_t(group) * rows.rows + row) * H);
  }

  // The element at which the row begins in a table that has the order of the run.
  MMIXER_DEVICE int64_t run_offset(int row, int64_t stride_group) const {
    if (reverse) row = rows.rows - rows.samples + 2 * (row % rows.samples) - row;
    return group * stride_group + int64_t(row) * H;
  }

  // The summands of the gradients of scale and shift.
  template <class T>
  MMIXER_DEVICE AffineSums<T> affine_sums(void* grad_norm) const {
    const int64_t offset = int64_t(block) * 2 * H;
    return {{grad_norm, offset, H, true}, {grad_norm, offset + H, H, true}};
  }
};

// Calls f(part, share) with the part of the two that this block is of.
template <class Arguments, class F>
MMIXER_DEVICE void of_part(const Arguments& a, F f) {
  const int first = a.G * a.part[0].blocks;  // block of the second part
  const bool second = block_index() >= first;
  const auto& part = a.part[second];
  f(part, Share(block_index() - (second ? first : 0), part, a.H));
}

// y = tanh(LN(a)): Eq. 7, Eq. 8. Without context the first is f_tilde.
template <Dtype dtype>
struct NormTanh : RowKernel<dtype, NormTanhArguments> {
  MMIXER_DEVICE static void run(void* shared, const NormTanhArguments& arguments) {
    using T = Wide<dtype>;
    const int H = arguments.H;
    const T eps = T(arguments.eps);
    RowBlock<T> block(shared, H);
    of_part(arguments, [&](const NormTanhRows& part, const Share& share) {
      const Affine<wide<dtype>> affine(arguments.norms, arguments.G, share.group, part.gate, H);
      share.each_row([&](int row, int64_t offset) {
        const Row<wide<dtype>> a(part.a, offset, H);
        const Result<dtype> y(part.y, share.run_offset(row, part.y_stride_group));
        const auto normal = normalization(a, block, eps, affine.exists);
        each_column(H, [&](Column c) { y(c, Activation<false>::tanh(affine(c, normal(a(c))))); });
      });
    });
  }
};

template <Dtype dtype>
struct NormTanhBackward : RowKernel<dtype, NormTanhBackwardArguments> {
  MMIXER_DEVICE static void run(void* shared, const NormTanhBackwardArguments& arguments) {
    using T = Wide<dtype>;
    const int H = arguments.H;
    const T eps = T(arguments.eps);
    RowBlock<T> block(shared, H);
    of_part(arguments, [&](const NormTanhBackwardRows& part, const Share& share) {
      const Affine<wide<dtype>> affine(arguments.norms, arguments.G, share.group, part.gate, H);
      auto sums = share.affine_sums<T>(part.grad_norm);
      share.each_row([&](int row, int64_t offset) {
        const int64_t run_offset = share.run_offset(row, int64_t(part.rows) * H);
        const Row<wide<dtype>> a(part.a, offset, H), grad(part.grad_y, run_offset, H),
            more(part.grad_y_more, offset, part.grad_y_more ? H : 0);
        const Result<dtype> grad_a(part.grad_a, offset);
        const auto normal = normalization(a, block, eps, affine.exists);
        const auto x_hat = [&](Column c) { return normal(a(c)); };
        const Held dy(H, [&](Column c) {
          return tanh_backward(grad(c) + more(c), Activation<false>::tanh(affine(c, x_hat(c))));
        });
        norm_gradient(x_hat, dy, normal.r_std, affine, block, sums, grad_a);
      });
      sums.store();
    });
  }
};

// s = sigmoid(LN(a + context)), f_tilde = s f_bar + (1 - s) g_bar: Eq. 9, 10. With concat f_tilde
// is LN(a + context).
template <Dtype dtype>
struct MixRow {
  const int64_t offset, sample_offset;  // of the row, and of its sample in [G][B][H]
  const bool gated;
  const Row<wide<dtype>> a, context;
  const Row<dtype> f_bar, g_bar;  // zeros with concat

  MMIXER_DEVICE MixRow(const MixArguments& m, int group, int row, int64_t row_offset)
      : offset(row_offset),
        sample_offset((int64_t(group) * m.samples + row % m.samples) * m.H),
        gated(m.mix == mmixer::Mix::gated),
        a(m.a, offset, m.H),
        context(m.context, sample_offset, m.H),
        f_bar(m.f_bar, offset, gated ? m.H : 0),
        g_bar(m.g_bar, sample_offset, gated ? m.H : 0) {}
};

template <Dtype dtype>
struct Mix : RowKernel<dtype, MixArguments> {
  MMIXER_DEVICE static void run(void* shared, const MixArguments& arguments) {
    using T = Wide<dtype>;
    const int H = arguments.H;
    const T eps = T(arguments.eps);
    RowBlock<T> block(shared, H);
    const Share share(block_index(), arguments, H);
    const Affine<wide<dtype>> affine(arguments.norms, arguments.G, share.group, gate_s, H);
    share.each_row([&](int row, int64_t offset) {
      const MixRow<dtype> m(arguments, share.group, row, offset);
      const Result<dtype> f_tilde(arguments.f_tilde,
                                  share.run_offset(row, arguments.f_tilde_stride_group));
      const Held x(H, [&](Column c) { return m.a(c) + m.context(c); });
      const auto normal = normalization(x, block, eps, affine.exists);
      each_column(H, [&](Column c) {
        T y = affine(c, normal(x(c)));
        if (m.gated) y = interpolate(Activation<false>::sigmoid(y), m.f_bar(c), m.g_bar(c));
        f_tilde(c, y);
      });
    });
  }
};

template <Dtype dtype>
struct MixBackward : RowKernel<dtype, MixArguments> {
  MMIXER_DEVICE static void run(void* shared, const MixArguments& arguments) {
    using T = Wide<dtype>;
    const int H = arguments.H;
    const T eps = T(arguments.eps);
    RowBlock<T> block(shared, H);
    const Share share(block_index(), arguments, H);
    const Affine<wide<dtype>> affine(arguments.norms, arguments.G, share.group, gate_s, H);
    auto sums = share.affine_sums<T>(arguments.grad_norm);
    share.each_row([&](int row, int64_t offset) {
      const MixRow<dtype> m(arguments, share.group, row, offset);
      const Row<wide<dtype>> grad(arguments.grad_f_tilde,
                                  share.run_offset(row, int64_t(arguments.rows) * H), H);
      const Held x(H, [&](Column c) { return m.a(c) + m.context(c); });
      const auto normal = normalization(x, block, eps, affine.exists);
      const auto x_hat = [&](Column c) { return normal(x(c)); };
      const Held s(H, [&](Column c) { return Activation<false>::sigmoid(affine(c, x_hat(c))); });
      const auto dy = [&](Column c) {
        return m.gated ? sigmoid_backward(grad(c) * (m.f_bar(c) - m.g_bar(c)), s(c)) : grad(c);
      };
      norm_gradient(x_hat, dy, normal.r_std, affine, block, sums,
                    Result<dtype>(arguments.grad_a, offset));
      if (!m.gated) return;
      const Result<wide<dtype>> grad_f_bar(arguments.grad_f_bar, offset),
          grad_g_bar(arguments.grad_g_bar, offset);
      each_column(H, [&](Column c) {
        const T to_f = grad(c) * s(c);
        grad_f_bar(c, to_f), grad_g_bar(c, grad(c) - to_f);
      });
    });
    sums.store();
  }
};

}  // namespace mmixer::cuda
