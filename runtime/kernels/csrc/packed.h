// Products with packed weights of four and eight bits: what they have in common.
//
// Sixteen outputs of eight bits make a tile, or thirty-two of four. Its weights lie in the order in which the inputs come: 64
// bytes are sixteen outputs by four inputs (one int32 lane each), and of four-bit weights the low halves are the first four
// inputs of eight, the high halves the next four, of one half of the tile and then of the other. A tile's weights are read once
// for every 64 rows of activations.
//
// Integer sums are exact, and what follows them is multiplied and added one rounding at a time (nothing is fused), so
// every instruction set gives the same bits; `runtime/kernels/reference.py` says which.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "amx.h"
#include "codes.h"
#include "products.h"

namespace quasar {

constexpr int ROWS = 64;   // of activations, at a time
constexpr int64_t STACK = ROWS * TILE4;

// How many of the first rows AMX multiplies: what is left over are few.
inline int64_t amx_rows(int64_t count) { return fills_tile(count) ? count : count / AMX_ROWS * AMX_ROWS; }

// Inputs of a step by AMX, where there are rows enough and its steps divide `unit`; else 0.
inline int64_t amx_step(int64_t rows, int64_t unit) {
  return rows >= AMX_FROM && unit % 32 == 0 && amx_allowed() ? (unit % 64 ? 32 : 64) : 0;
}

inline Codes quantize(const at::Tensor& x, int64_t group) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  Codes q(rows, inputs, group);
  by_dtype(x.scalar_type(), [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(x.data_ptr());
    parallel_for(rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(inputs, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) q.put(m, from + m * inputs);
    });
  });
  return q;
}

// A product with a packed weight: what its kernel needs besides the activations.
struct Packed {
  const uint8_t* codes;
  const void* scale;  // bfloat16 or float
  bool narrow;
  const uint8_t* zero;  // or null: 8 throughout
  int64_t inputs, group;

  F scale_at(int64_t line) const {
    return narrow ? load(static_cast<const c10::BFloat16*>(scale) + line * LANES)
                  : load(static_cast<const float*>(scale) + line * LANES);
  }
  I zero_at(int64_t line) const { return zero ? widen(read<B>(zero + line * LANES)) : splat(int32_t(8)); }
};

// f(first row, rows, tile, y) fills y [rows, WIDTH] with a tile's outputs, behind which there is room for Segments::DEPTH of it,
// STACK floats apart; every 64 rows a thread goes through its tiles once. step: of AMX, whose registers are shaped for it, or 0.
template <int WIDTH, class Function>
void over_tiles(at::Tensor& out, int64_t inputs, int64_t step, const Function& f) {
  const int64_t rows = out.size(0), outputs = out.size(1), tiles = (outputs + WIDTH - 1) / WIDTH;
  const int64_t work = std::max<int64_t>(1, inputs * WIDTH * std::min<int64_t>(rows, ROWS) / (step ? 4 : 1));
  parallel_for(tiles, std::max<int64_t>(1, 262144 / work), [&](int64_t begin, int64_t end) {
    alignas(64) float y[Segments::DEPTH * STACK];
    std::optional<AmxTiles> shape;
    if (step) shape.emplace(step);
    for (int64_t m = 0; m < rows; m += ROWS)
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t count = std::min<int64_t>(ROWS, rows - m);
        f(m, count, tile, y);
        by_dtype(out.scalar_type(), [&](auto* type) {
          for (int64_t first = tile * WIDTH; first < std::min(outputs, (tile + 1) * WIDTH); first += LANES) {
            auto* to = static_cast<decltype(type)>(out.mutable_data_ptr()) + m * outputs + first;
            const float* from = y + first - tile * WIDTH;
            const int n = int(std::min<int64_t>(LANES, outputs - first));
            for (int64_t r = 0; r < count; ++r) store(to + r * outputs, load(from + r * WIDTH), n);
          }
        });
      }
  });
}

}  // namespace quasar
