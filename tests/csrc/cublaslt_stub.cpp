#include "cublaslt_stub.h"

#include <cstring>

#include "../../csrc/cuda/dtype.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mmixer;
using namespace mmixer::cuda;

namespace {

struct Description {
  int compute_type, scale_type;
  std::map<int, int32_t> attributes{};
};

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading, batch_stride;
  int32_t batch;

  Dtype dtype() const {
    return type == 0   ? Dtype::float32
           : type == 1 ? Dtype::float64
           : type == 2 ? Dtype::float16
                       : Dtype::bfloat16;
  }
  int64_t at(int64_t batch, int64_t row, int64_t column) const {
    return batch * batch_stride + column * leading + row;
  }
};

using Preference = std::map<int, uint64_t>;

Stub stub;

int answer(const char* name) {
  stub.calls[name]++;
  return stub.failing == name ? stub.status : 0;
}

template <class T, class... Values>
int create(const char* name, void** object, Values... values) {
  if (const int status = answer(name)) return status;
  stub.objects++;
  *object = new T{values...};
  return 0;
}

template <class T>
int destroy(void* object) {
  stub.objects--;
  delete static_cast<T*>(object);
  return 0;
}

template <class T>
T read(const void* value, size_t bytes) {
  T x{};
  if (bytes <= sizeof x) std::memcpy(&x, value, bytes);
  return x;
}

}  // namespace

EXPORT Stub* cublaslt_stub() { return &stub; }

EXPORT int cublasLtCreate(void** handle) { return *handle = &stub, answer("Create"); }
EXPORT int cublasLtGetProperty(int property, int* value) { return *value = 12 + property, 0; }
EXPORT const char* cublasLtGetStatusString(int) { return "the stub's words"; }

EXPORT int cublasLtMatmulDescCreate(void** object, int compute_type, int scale_type) {
  return create<Description>("MatmulDescCreate", object, compute_type, scale_type);
}
EXPORT int cublasLtMatmulDescDestroy(void* object) { return destroy<Description>(object); }
EXPORT int cublasLtMatmulDescSetAttribute(void* object, int attribute, const void* value,
                                          size_t bytes) {
  static_cast<Description*>(object)->attributes[attribute] = read<int32_t>(value, bytes);
  return answer("MatmulDescSetAttribute");
}

EXPORT int cublasLtMatrixLayoutCreate(void** object, int type, uint64_t rows, uint64_t columns,
                                      int64_t leading) {
  return create<Layout>("MatrixLayoutCreate", object, type, rows, columns, leading, int64_t(0), 1);
}
EXPORT int cublasLtMatrixLayoutDestroy(void* object) { return destroy<Layout>(object); }
EXPORT int cublasLtMatrixLayoutSetAttribute(void* object, int attribute, const void* value,
                                            size_t bytes) {
  Layout& layout = *static_cast<Layout*>(object);
  if (attribute == 5) layout.batch = read<int32_t>(value, bytes);
  if (attribute == 6) layout.batch_stride = read<int64_t>(value, bytes);
  return answer("MatrixLayoutSetAttribute");
}

EXPORT int cublasLtMatmulPreferenceCreate(void** object) {
  return create<Preference>("MatmulPreferenceCreate", object);
}
EXPORT int cublasLtMatmulPreferenceDestroy(void* object) { return destroy<Preference>(object); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void* object, int attribute, const void* value,
                                                size_t bytes) {
  (*static_cast<Preference*>(object))[attribute] = read<uint64_t>(value, bytes);
  return answer("MatmulPreferenceSetAttribute");
}

#ifndef STUB_WITHOUT_HEURISTIC
struct Found {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void*, void*, void*, void*, void*,
                                          void* preference, int most, Found* found, int* count) {
  stub.preference = *static_cast<Preference*>(preference);
  *count = most < stub.algorithms ? most : stub.algorithms;
  if (*count) *found = {{42}, 0, 0, 1, {}};
  return handle == &stub ? answer("MatmulAlgoGetHeuristic") : 7;
}
#endif

// D = op(A) op(B), column-major.
EXPORT int cublasLtMatmul(void* handle, void* object, const void* alpha, const void* a,
                          void* a_layout, const void* b, void* b_layout, const void* beta,
                          const void* c, void* c_layout, void* d, void* d_layout,
                          const uint64_t* algorithm, void* workspace, size_t workspace_bytes,
                          void* stream) {
  if (stub.at_matmul) stub.at_matmul();
  const Description& description = *static_cast<Description*>(object);
  const Layout &of_a = *static_cast<Layout*>(a_layout), &of_b = *static_cast<Layout*>(b_layout),
               &of_d = *static_cast<Layout*>(d_layout);
  const auto attribute = [&](int i) {
    const auto found = description.attributes.find(i);
    return found == description.attributes.end() ? 0 : found->second;
  };
  const bool a_transposed = attribute(3), b_transposed = attribute(4);
  const uint64_t inner = a_transposed ? of_a.rows : of_a.columns;
  const bool wide = description.scale_type == 1;
  const double factor =
                   wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha),
               before = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
  stub.compute_type = description.compute_type, stub.scale_type = description.scale_type;
  stub.workspace = workspace, stub.workspace_bytes = workspace_bytes, stub.stream = stream;
  if (handle != &stub || *algorithm != 42 || factor != 1 || before != 0 || c != d ||
      c_layout != d_layout || of_a.type != of_b.type || of_a.batch != of_d.batch ||
      of_b.batch != of_d.batch || of_d.rows != (a_transposed ? of_a.columns : of_a.rows) ||
      of_d.columns != (b_transposed ? of_b.rows : of_b.columns) ||
      inner != (b_transposed ? of_b.columns : of_b.rows) || of_a.leading < int64_t(of_a.rows) ||
      of_b.leading < int64_t(of_b.rows) || of_d.leading < int64_t(of_d.rows))
    return 7;
  for (int batch = 0; batch < of_d.batch; batch++)
    for (uint64_t i = 0; i < of_d.rows; i++)
      for (uint64_t j = 0; j < of_d.columns; j++) {
        double sum = 0;
        for (uint64_t k = 0; k < inner; k++)
          sum += load_as<double>(a, of_a.dtype(),
                                 a_transposed ? of_a.at(batch, k, i) : of_a.at(batch, i, k)) *
                 load_as<double>(b, of_b.dtype(),
                                 b_transposed ? of_b.at(batch, j, k) : of_b.at(batch, k, j));
        store_as(d, of_d.dtype(), of_d.at(batch, i, j), sum);
      }
  return answer("Matmul");
}
