#include "products.h"

#include <algorithm>
#include <vector>

#include "../cuda/dtype.h"
#include "emulator.h"

namespace mmixer::cuda::emulator {
namespace {

// An operand's matrix as [rows][columns] in T, where its lines in memory are `lines` runs of
// `length` elements.
template <class T>
std::vector<T> widen(const Operand& operand, int64_t batch, Dtype dtype, bool transpose,
                     int64_t rows, int64_t columns) {
  std::vector<T> wide(size_t(rows) * columns);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      wide[i * columns + j] =
          load_as<T>(operand.p, dtype,
                     batch * operand.batch_stride +
                         (transpose ? j * operand.stride + i : i * operand.stride + j));
  return wide;
}

// Terms that are summed by themselves before they are added to a result: a tensor core and a split
// product round no more often.
constexpr int64_t run = 64;

template <class T>
void multiply(const Product& x) {
  std::vector<T> b, sum(x.columns), part(x.columns);
  for (int64_t batch = 0; batch < x.batch; batch++) {
    const std::vector<T> a = widen<T>(x.a, batch, x.dtype, x.a.transposed, x.rows, x.inner);
    if (batch == 0 || x.b.batch_stride != 0)
      b = widen<T>(x.b, batch, x.dtype, x.b.transposed, x.inner, x.columns);
    for (int64_t i = 0; i < x.rows; i++) {
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t first = 0; first < x.inner; first += run) {
        std::fill(part.begin(), part.end(), T(0));
        for (int64_t k = first; k < std::min(first + run, x.inner); k++) {
          const T factor = a[i * x.inner + k];
          const T* const row = &b[k * x.columns];
          for (int64_t j = 0; j < x.columns; j++) part[j] += factor * row[j];
        }
        for (int64_t j = 0; j < x.columns; j++) sum[j] += part[j];
      }
      for (int64_t j = 0; j < x.columns; j++)
        store_as(x.result, x.result_dtype, batch * x.result_batch_stride + i * x.result_stride + j,
                 sum[j]);
    }
  }
}

}  // namespace

void multiply(const Product& product, void* stream) {
  count("product", stream);
  if (!options().run) return;
  product.dtype == Dtype::float64 ? multiply<double>(product) : multiply<float>(product);
}

}  // namespace mmixer::cuda::emulator
