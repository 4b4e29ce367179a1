// Activations as signed bytes, each group of inputs with a scale of its own.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "amx.h"
#include "products.h"

namespace quasar {

struct Codes {
  int64_t rows, inputs, group;  // a group divides the inputs
  int64_t stride;               // bytes of a row of codes
  std::vector<I> code;          // signed bytes [M, K]; zeros up to a whole tile where one is multiplied
  std::vector<float> scale;     // [groups, M]
  std::vector<int32_t> sum;     // of codes, [groups, M]

  Codes(int64_t rows, int64_t inputs, int64_t group)
      : rows(rows), inputs(inputs), group(group), stride(spread(inputs)),
        code((fills_tile(rows) ? (rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS : rows) * stride / sizeof(I)),
        scale(rows * groups()), sum(rows * groups()) {}

  int64_t groups() const { return group ? inputs / group : 0; }
  int8_t* at(int64_t row) { return reinterpret_cast<int8_t*>(code.data()) + row * stride; }
  const int8_t* at(int64_t row) const { return reinterpret_cast<const int8_t*>(code.data()) + row * stride; }

  // Rounds one group of a row.
  template <class T>
  void put(int64_t row, int64_t g, const T* x) {
    int8_t* to = at(row) + g * group;
    const Rounding how = Rounding::of(x, group, 127.0f);
    I total = {};
    for (int64_t k = 0; k < group; k += LANES) {
      const int n = int(std::min<int64_t>(LANES, group - k));
      const I c = how.some ? round_to_int(load(x + k, n) * how.inverse) : I{};
      total += c;
      const B b = narrow(c);
      std::memcpy(to + k, &b, n);
    }
    sum[g * rows + row] = quasar::sum(total);
    scale[g * rows + row] = how.scale;
  }
  template <class T>
  void put(int64_t row, const T* x) {
    for (int64_t g = 0; g < groups(); ++g) put(row, g, x + g * group);
  }
};

}  // namespace quasar
