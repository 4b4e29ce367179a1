// Products with bfloat16 weights as the file has them, [outputs, inputs], by AMX.
//
// The weight is the left matrix of a tile product and the rows of activations are columns, laid out for it once; so a
// weight needs no packing and can be an embedding's table as well. A result is summed over the inputs, 32 at a time from
// the first on, whatever other columns the tile has. Weights are read once: what a thread has of them for 32 outputs
// stays in its cache for all rows.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "amx.h"

namespace quasar {
namespace {

constexpr int64_t STEP = 32;  // inputs of a tile
typedef c10::BFloat16 T;

#if defined(QUASAR_AMX_BF16)

// Two tiles of outputs by one or two of rows: sums [2][ROW][16 outputs][16 rows]. Asks for `next` meanwhile.
template <int ROW>
void products(const T* weight, int64_t inputs, const T* x, const char* next, float* sums) {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (ROW == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  const int64_t stride = inputs * int64_t(sizeof(T)), block = inputs * AMX_ROWS;
  for (int64_t k = 0; k < inputs; k += STEP) {
    if (next)
      for (int i = 0; i < 32; ++i) __builtin_prefetch(next + k * 64 + i * 64, 0, 2);
    _tile_loadd(4, weight + k, stride);
    _tile_loadd(5, weight + block + k, stride);
    _tile_loadd(6, x + k * AMX_ROWS, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (ROW == 2) {
      _tile_loadd(7, x + block + k * AMX_ROWS, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + ROW * 256, 64);
  if constexpr (ROW == 2) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// Sixteen rows side by side, pairs of inputs together: [blocks][K / 2][16][2], zero where there is no row.
std::vector<T> columns(const T* x, int64_t rows, int64_t inputs) {
  std::vector<T> laid((rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS * inputs);
  for (int64_t m = 0; m < rows; ++m) {
    T* to = laid.data() + m / AMX_ROWS * AMX_ROWS * inputs + m % AMX_ROWS * 2;
    for (int64_t k = 0; k < inputs; k += 2) std::memcpy(to + k * AMX_ROWS, x + m * inputs + k, 2 * sizeof(T));
  }
  return laid;
}

// The outputs first..first + 32 of all rows; `weight` begins with the first.
void outputs_of(const T* weight, const T* x, int64_t rows, int64_t inputs, int64_t first, int64_t outputs, const char* next,
                T* out) {
  alignas(64) float sums[1024];
  for (int64_t m = 0; m < rows; m += 2 * AMX_ROWS) {
    const int blocks = m + AMX_ROWS < rows ? 2 : 1;
    if (blocks == 2) products<2>(weight, inputs, x + m * inputs, m ? nullptr : next, sums);
    else products<1>(weight, inputs, x + m * inputs, m ? nullptr : next, sums);
    for (int o = 0; o < 2; ++o)
      for (int b = 0; b < blocks; ++b) {
        F tile[LANES];
        for (int i = 0; i < LANES; ++i) tile[i] = load(sums + (o * blocks + b) * 256 + i * LANES);
        transpose(tile);
        const int64_t n = first + o * LANES, row = m + b * AMX_ROWS;
        if (n >= outputs) continue;
        const int width = int(std::min<int64_t>(LANES, outputs - n));
        for (int64_t i = 0; i < std::min<int64_t>(LANES, rows - row); ++i) store(out + (row + i) * outputs + n, tile[i], width);
      }
  }
}

#endif

}  // namespace

// Whether `dense_linear` works on this machine.
bool has_dense() {
#if defined(QUASAR_AMX_BF16)
  return amx_allowed();
#else
  return false;
#endif
}

// x [M, K], weight [N, K], both bfloat16, K a multiple of 32 -> [M, N].
at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  TORCH_CHECK(has_dense() && inputs % STEP == 0, "this product takes AMX and inputs in multiples of ", STEP);
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "a dense product takes contiguous tensors");
  at::Tensor out = at::empty({rows, outputs}, x.options());
#if defined(QUASAR_AMX_BF16)
  if (rows == 0) return out;
  const auto* w = weight.const_data_ptr<T>();
  auto* y = out.mutable_data_ptr<T>();
  const std::vector<T> laid = columns(x.const_data_ptr<T>(), rows, inputs);
  const int64_t wide = 2 * LANES, chunks = (outputs + wide - 1) / wide;
  at::parallel_for(0, chunks, std::max<int64_t>(1, 65536 / (inputs * wide)), [&](int64_t begin, int64_t end) {
    AmxTiles tiles;
    std::vector<T> last;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * wide, left = outputs - first;
      const T* from = w + first * inputs;
      const char* next = c + 1 < end && left >= 2 * wide ? reinterpret_cast<const char*>(from + wide * inputs) : nullptr;
      if (left >= wide) {
        outputs_of(from, laid.data(), rows, inputs, first, outputs, next, y);
        continue;
      }
      last.resize(wide * inputs);  // with zeros behind the last output
      std::memcpy(last.data(), from, left * inputs * sizeof(T));
      outputs_of(last.data(), laid.data(), rows, inputs, first, outputs, nullptr, y);
    }
  });
#endif
  return out;
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def("has_dense() -> bool", &quasar::has_dense);
  m.def("dense_linear(Tensor x, Tensor weight) -> Tensor", &quasar::dense_linear);
}
