#include "cublaslt.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace mmixer::cuda::cublaslt {
namespace {

struct Library {
  Functions functions{};
  std::string refusal;
};

// The paths of the libraries of this name that the process has loaded.
std::vector<std::string> loaded() {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* paths) {
        const char* const slash = std::strrchr(info->dlpi_name, '/');
        const char* const file = slash ? slash + 1 : info->dlpi_name;
        if (std::strncmp(file, "libcublasLt.so", 14) == 0)
          static_cast<std::vector<std::string>*>(paths)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  return paths;
}

// The first symbol that is missing, or null.
const char* read(void* library, Functions& functions) {
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    return function ? nullptr : name;
  };
  const char* missing = nullptr;
#define MMIXER_FIND(name)                                               \
  if (const char* const lacks = find(functions.name, "cublasLt" #name); \
      !missing && std::strcmp(#name, "GetStatusString") != 0)           \
    missing = lacks;
  MMIXER_CUBLASLT_FUNCTIONS(MMIXER_FIND)
#undef MMIXER_FIND
  return missing;
}

Library find_library() {
  Library library;
  const std::vector<std::string> paths = loaded();
  for (const std::string& path : paths) {
    // The handle is kept, so that what was found stays loaded.
    void* const handle = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    const char* const missing = handle ? read(handle, library.functions) : nullptr;
    if (handle && !missing) return library.refusal.clear(), library;
    library.refusal = path + (handle ? std::string(" has no ") + missing : " has been unloaded");
  }
  if (paths.empty() && read(RTLD_DEFAULT, library.functions))  // linked into another library
    library.refusal = "no libcublasLt is loaded";
  return library;
}

// Neither this nor the kept Matmuls are destroyed at the program's end, when the library may be
// gone.
const Library& library() {
  static const Library& library = *new Library(find_library());
  return library;
}

std::string text_of(Dtype dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[int(dtype)];
}

std::string text_of(const Product& x) {
  const auto text = [](int64_t i) { return std::to_string(i); };
  const auto operand = [&](const Operand& a) {
    return std::string(a.transposed ? "transposed, " : "") + "strides " + text(a.batch_stride) +
           " and " + text(a.stride);
  };
  return "the product " + text(x.batch) + " x [" + text(x.rows) + ", " + text(x.inner) + "] [" +
         text(x.inner) + ", " + text(x.columns) + "] in " + text_of(x.dtype) + " to " +
         text_of(x.result_dtype) + " (a: " + operand(x.a) + "; b: " + operand(x.b) +
         "; result: strides " + text(x.result_batch_stride) + " and " + text(x.result_stride) + ")";
}

std::string words(Status status) {
  const auto describe = library().functions.GetStatusString;
  return "status " + std::to_string(status) +
         (describe ? std::string(" (") + describe(status) + ")" : "");
}

void check(Status status, const char* call, const Product& product) {
  if (status != status_success)
    throw std::runtime_error(std::string("cublasLt") + call + " failed with " + words(status) +
                             " for " + text_of(product));
}

#define MMIXER_CALL(product, name, ...) check(library().functions.name(__VA_ARGS__), #name, product)

// The bytes of which an address is a multiple, as far as kernels ask.
int64_t alignment(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) | 256;
  return int64_t(address & -address);
}

// All that a Matmul depends on.
using Key = std::array<int64_t, 19>;

Key key_of(int device, const Product& x) {
  return {device,
          x.batch,
          x.rows,
          x.columns,
          x.inner,
          x.a.stride,
          x.a.batch_stride,
          x.a.transposed,
          x.b.stride,
          x.b.batch_stride,
          x.b.transposed,
          x.result_stride,
          x.result_batch_stride,
          int64_t(x.dtype),
          int64_t(x.result_dtype),
          x.allow_tf32,
          alignment(x.a.p),
          alignment(x.b.p),
          alignment(x.result)};
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t x : key) {
      hash = (hash ^ uint64_t(x)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return size_t(hash);
  }
};

int type_of(Dtype dtype) {
  constexpr int types[] = {type_float32, type_float64, type_bfloat16, type_float16};
  return types[int(dtype)];
}

// A matrix in column-major order, which is cuBLASLt's: `leading` elements from column to column.
struct Columns {
  int64_t rows, columns, leading, batch_stride;
};

Columns columns_of(int64_t rows, int64_t columns, int64_t stride, int64_t batch_stride) {
  // The stride of a single column is never taken, and may be anything.
  return {rows, columns, columns > 1 ? stride : std::max(stride, rows), batch_stride};
}

// The operand as it lies in memory: its row-major lines are columns.
Columns columns_of(const Operand& operand, int64_t rows, int64_t columns) {
  return operand.transposed ? columns_of(rows, columns, operand.stride, operand.batch_stride)
                            : columns_of(columns, rows, operand.stride, operand.batch_stride);
}

// An object of cuBLASLt's, and the function that destroys it.
using Object = std::unique_ptr<void, Status (*)(void*)>;

Object layout_of(const Product& product, Dtype dtype, const Columns& columns) {
  void* p = nullptr;
  MMIXER_CALL(product, MatrixLayoutCreate, &p, type_of(dtype), uint64_t(columns.rows),
              uint64_t(columns.columns), columns.leading);
  Object layout(p, library().functions.MatrixLayoutDestroy);
  if (product.batch == 1) return layout;
  const int32_t batch = int32_t(product.batch);
  MMIXER_CALL(product, MatrixLayoutSetAttribute, p, layout_batch, &batch, sizeof batch);
  MMIXER_CALL(product, MatrixLayoutSetAttribute, p, layout_batch_stride, &columns.batch_stride,
              sizeof columns.batch_stride);
  return layout;
}

Object description_of(const Product& product) {
  const int compute = product.dtype == Dtype::float64                         ? compute_float64
                      : product.dtype == Dtype::float32 && product.allow_tf32 ? compute_tf32
                                                                              : compute_float32;
  void* p = nullptr;
  MMIXER_CALL(product, MatmulDescCreate, &p, compute,
              product.dtype == Dtype::float64 ? type_float64 : type_float32);
  Object description(p, library().functions.MatmulDescDestroy);
  const auto set = [&](int attribute, const Operand& operand) {
    const int32_t operation = operand.transposed ? operation_transposed : operation_none;
    MMIXER_CALL(product, MatmulDescSetAttribute, p, attribute, &operation, sizeof operation);
  };
  set(description_transposed_a, product.b), set(description_transposed_b, product.a);
  return description;
}

Object preference_of(const Product& product) {
  void* p = nullptr;
  MMIXER_CALL(product, MatmulPreferenceCreate, &p);
  Object preference(p, library().functions.MatmulPreferenceDestroy);
  const auto set = [&](int attribute, auto value) {
    MMIXER_CALL(product, MatmulPreferenceSetAttribute, p, attribute, &value, sizeof value);
  };
  set(preference_workspace, uint64_t(product_workspace_bytes));
  // The parts of a split sum are added up in a fixed order and not in the result's dtype. Without
  // the other schemes, equal inputs give equal bits.
  set(preference_reductions, uint32_t(reduction_compute_type));
  set(preference_alignment_a, uint32_t(alignment(product.b.p)));
  set(preference_alignment_b, uint32_t(alignment(product.a.p)));
  set(preference_alignment_c, uint32_t(alignment(product.result)));
  set(preference_alignment_d, uint32_t(alignment(product.result)));
  return preference;
}

}  // namespace

// cuBLASLt's matrices are column-major, and so it makes the transposed product, result^T = b^T a^T:
// row-major in memory, a matrix is its own transpose in column-major order.
class Matmul {
 public:
  Matmul() = default;
  explicit Matmul(const Product& x)
      : description_(description_of(x)),
        a_(layout_of(x, x.dtype, columns_of(x.b, x.inner, x.columns))),
        b_(layout_of(x, x.dtype, columns_of(x.a, x.rows, x.inner))),
        d_(layout_of(x, x.result_dtype,
                     columns_of(x.columns, x.rows, x.result_stride, x.result_batch_stride))) {}

  // Takes the first algorithm of the heuristic; else returns why there is none.
  std::string choose(void* handle, const Product& product) {
    const Object preference = preference_of(product);
    Heuristic found{};
    int count = 0;
    Status status = library().functions.MatmulAlgoGetHeuristic(handle, description_.get(), a_.get(),
                                                               b_.get(), d_.get(), d_.get(),
                                                               preference.get(), 1, &found, &count);
    if (status == status_success && count > 0) status = found.status;
    if (status == status_not_supported || status == status_invalid_value ||
        status == status_arch_mismatch)
      return "cublasLtMatmulAlgoGetHeuristic answered " + words(status);
    check(status, "MatmulAlgoGetHeuristic", product);
    if (count == 0) return "cublasLtMatmulAlgoGetHeuristic found no algorithm";
    handle_ = handle, algorithm_ = found.algorithm;
    return "";
  }

  bool multiply(const Product& product, void* workspace, void* stream) const {
    if (!handle_) return false;
    constexpr float one = 1, zero = 0;
    constexpr double wide_one = 1, wide_zero = 0;
    const bool wide = product.dtype == Dtype::float64;
    const void* const alpha = wide ? static_cast<const void*>(&wide_one) : &one;
    const void* const beta = wide ? static_cast<const void*>(&wide_zero) : &zero;
    MMIXER_CALL(product, Matmul, handle_, description_.get(), alpha, product.b.p, a_.get(),
                product.a.p, b_.get(), beta, product.result, d_.get(), product.result, d_.get(),
                &algorithm_, workspace, product_workspace_bytes, stream);
    return true;
  }

 private:
  Object description_{nullptr, nullptr}, a_{nullptr, nullptr}, b_{nullptr, nullptr},
      d_{nullptr, nullptr};
  void* handle_ = nullptr;  // null where cuBLASLt does not take such products
  Algorithm algorithm_{};
};

namespace {

struct Kept {
  std::mutex mutex;
  std::map<int, void*> handles;  // by device
  std::unordered_map<Key, std::shared_ptr<const Matmul>, Hash> matmuls;
  std::vector<std::string> refused;
};

Kept& kept() {
  static Kept& kept = *new Kept;
  return kept;
}

// Sequences of ever other lengths fill this; what is thrown away is made again when it is needed.
constexpr size_t most_matmuls = 4096;
constexpr size_t most_refused = 64;

// Why a product cannot be described to cuBLASLt; empty where it can.
std::string indescribable(const Product& x) {
  const auto overlap = [](const Columns& columns) { return columns.leading < columns.rows; };
  if (x.inner < 1) return "it sums no terms";
  if (x.batch > INT32_MAX) return "the batch is larger than 2^31 - 1";
  if (overlap(columns_of(x.a, x.rows, x.inner)) || overlap(columns_of(x.b, x.inner, x.columns)))
    return "rows of an operand overlap in memory";
  return "";
}

}  // namespace

const std::string& refusal() { return library().refusal; }

std::string version() {
  std::string text;
  for (const int property : {property_major, property_minor, property_patch}) {
    int value = 0;
    const Status status = library().functions.GetProperty(property, &value);
    if (status != status_success)
      throw std::runtime_error("cublasLtGetProperty failed with " + words(status));
    text += (text.empty() ? "" : ".") + std::to_string(value);
  }
  return text;
}

std::shared_ptr<const Matmul> find(int device, const Product& product) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.matmuls.find(key_of(device, product));
  return found == all.matmuls.end() ? nullptr : found->second;
}

std::shared_ptr<const Matmul> make(int device, const Product& product) {
  std::string refusal = indescribable(product);
  const auto matmul =
      refusal.empty() ? std::make_shared<Matmul>(product) : std::make_shared<Matmul>();
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (refusal.empty()) {
    void*& handle = all.handles[device];
    if (!handle) MMIXER_CALL(product, Create, &handle);
    refusal = matmul->choose(handle, product);
  }
  if (!refusal.empty() && all.refused.size() < most_refused) {
    const std::string line = text_of(product) + ": " + refusal;
    if (std::find(all.refused.begin(), all.refused.end(), line) == all.refused.end())
      all.refused.push_back(line);
  }
  if (all.matmuls.size() >= most_matmuls) all.matmuls.clear();
  return all.matmuls.emplace(key_of(device, product), matmul).first->second;
}

bool multiply(const Matmul& matmul, const Product& product, void* workspace, void* stream) {
  return matmul.multiply(product, workspace, stream);
}

std::vector<std::string> refused_products() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.refused;
}

}  // namespace mmixer::cuda::cublaslt
