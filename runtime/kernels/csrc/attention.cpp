// Paged attention and the write to its cache.
//
// A task is a run of rows of one sequence with one head of keys: a piece of 64 keys and values is turned to float once
// and serves every row and every query head that shares it. A row's own order of operations is fixed: products of a
// score in order of the dimension, pieces from the first to the last, keys within a piece from the first to the last.
// Rows of an eight-bit cache become floats as they are read; `rows.h` has their layout.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "rows.h"
#include "simd.h"

namespace quasar {
namespace {

constexpr int PIECE = 64;      // keys
constexpr int VECS = PIECE / LANES;
constexpr int TASK_ROWS = 64;  // query vectors (rows times heads) of one task, about

struct Task {
  int64_t begin, end;  // rows
};

struct Scratch {
  std::vector<float> query, keys, values, weights, out, top, total;
};

// weights[r][0..63] = query[r] . keys, with keys [D][64].
template <int R>
void scores(const float* const* query, const float* keys, int64_t dim, float* const* weights) {
  F acc[R][VECS] = {};
  for (int64_t d = 0; d < dim; ++d) {
    F k[VECS];
    for (int v = 0; v < VECS; ++v) k[v] = load(keys + d * PIECE + v * LANES);
    for (int r = 0; r < R; ++r) {
      F q = splat(query[r][d]);
      for (int v = 0; v < VECS; ++v) acc[r][v] = fma(q, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECS; ++v) store(weights[r] + v * LANES, acc[r][v]);
}

// out[r] = out[r] * scale[r] + weights[r] . values, over the keys low..high, for V vectors of the dimension.
template <int R, int V>
void blend(float* const* weights, const float* values, int64_t stride, int low, int high, float* const* out,
           const float* scale) {
  F acc[R][V] = {};
  for (int j = low; j <= high; ++j) {
    F x[V];
    for (int v = 0; v < V; ++v) x[v] = load(values + j * stride + v * LANES);
    for (int r = 0; r < R; ++r) {
      F w = splat(weights[r][j]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* y = out[r] + v * LANES;
      store(y, fma(load(y), splat(scale[r]), acc[r][v]));
    }
}

template <int R>
void blend_all(float* const* weights, const float* values, int64_t padded, int low, int high, float* const* out,
               const float* scale) {
  int64_t d = 0;
  float* at[R];
  auto move = [&] {
    for (int r = 0; r < R; ++r) at[r] = out[r] + d;
  };
  for (; d + 4 * LANES <= padded; d += 4 * LANES)
    move(), blend<R, 4>(weights, values + d, padded, low, high, at, scale);
  for (; d < padded; d += LANES) move(), blend<R, 1>(weights, values + d, padded, low, high, at, scale);
}

struct Shape {
  int64_t heads, kv_heads, dim, padded, block, max_blocks, blocks;
  float scale, cap;
  int64_t window;
};

// Keys low..high of a piece as [D][64] and its values as [64][D], in float; blocks that aren't there are zero, as no row
// that asks for them is let in. Asks for the next piece's, up to `last`, meanwhile.
template <class C>
void read_piece(const Shape& s, const int32_t* table, int64_t base, int low, int high, int64_t last, int64_t kv,
                const C* key_cache, const C* value_cache, Scratch& m) {
  const int64_t width = row_width<C>(s.dim);
  auto slot = [&](int64_t place) {
    const int64_t block = table[place / s.block];
    return block >= 0 && block < s.blocks ? ((block * s.kv_heads + kv) * s.block + place % s.block) * width : -1;
  };
  for (int first = 0; first < PIECE; first += LANES) {
    const C* key[LANES];
    F step[LANES];
    for (int i = 0; i < LANES; ++i) {
      const int j = first + i;
      const int64_t at = j >= low && j <= high ? slot(base + j) : -1;
      const int64_t next = base + j + PIECE <= last ? slot(base + j + PIECE) : -1;
      key[i] = at >= 0 ? key_cache + at : nullptr;
      step[i] = splat(at >= 0 ? scale_of(key_cache + at, s.dim) : 0.0f);
      const F value_step = splat(at >= 0 ? scale_of(value_cache + at, s.dim) : 0.0f);
      float* values = m.values.data() + j * s.padded;
      for (int64_t d = 0; next >= 0 && d < s.dim; d += 64 / int64_t(sizeof(C))) {
        __builtin_prefetch(key_cache + next + d);
        __builtin_prefetch(value_cache + next + d);
      }
      for (int64_t d = 0; d < s.dim; d += LANES)
        store(values + d, at >= 0 ? load(value_cache + at + d, int(std::min<int64_t>(LANES, s.dim - d))) * value_step : F{});
    }
    for (int64_t d = 0; d < s.dim; d += LANES) {
      const int n = int(std::min<int64_t>(LANES, s.dim - d));
      F x[LANES];
      for (int i = 0; i < LANES; ++i) x[i] = key[i] ? load(key[i] + d, n) * step[i] : F{};
      transpose(x);
      for (int i = 0; i < LANES; ++i) store(m.keys.data() + (d + i) * PIECE + first, x[i]);
    }
  }
}

template <class T, class C>
void run_task(const Shape& s, const Task& task, int64_t kv, const T* query, const C* key_cache, const C* value_cache,
              const int32_t* table, const int32_t* positions, const float* sinks, T* result, Scratch& m) {
  const int64_t share = s.heads / s.kv_heads, rows = task.end - task.begin, count = rows * share;
  m.query.resize(count * s.dim);
  m.weights.resize(count * PIECE);
  m.out.assign(count * s.padded, 0.0f);
  m.top.assign(count, -INFINITY);
  m.total.assign(count, 0.0f);
  m.keys.resize(s.padded * PIECE);
  m.values.resize(PIECE * s.padded);
  int64_t first = INT64_MAX, last = -1;
  auto start = [&](int64_t i) {
    const int64_t p = positions[task.begin + i];
    return s.window > 0 && p + 1 > s.window ? p + 1 - s.window : int64_t(0);
  };
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t p = positions[task.begin + i];
    if (p < 0) continue;
    first = std::min(first, start(i));
    last = std::max(last, p);
    for (int64_t h = 0; h < share; ++h)
      for (int64_t d = 0; d < s.dim; ++d)
        m.query[(i * share + h) * s.dim + d] = float(query[((task.begin + i) * s.heads + kv * share + h) * s.dim + d]);
  }
  std::vector<const float*> q(count);
  std::vector<float*> w(count), y(count);
  std::vector<float> fade(count);
  std::vector<int> low(count), high(count);  // the keys of the piece that a row sees
  for (int64_t piece = last < 0 ? 1 : first / PIECE; piece * PIECE <= last; ++piece) {
    const int64_t base = piece * PIECE;
    int64_t active = 0;
    int least = PIECE, most = -1;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = positions[task.begin + i], from = start(i);
      if (p < base || from >= base + PIECE) continue;
      for (int64_t h = 0; h < share; ++h, ++active) {
        const int64_t c = i * share + h;
        q[active] = m.query.data() + c * s.dim;
        w[active] = m.weights.data() + c * PIECE;
        y[active] = m.out.data() + c * s.padded;
        low[active] = int(std::max<int64_t>(from - base, 0));
        high[active] = int(std::min<int64_t>(p - base, PIECE - 1));
        least = std::min(least, low[active]);
        most = std::max(most, high[active]);
      }
    }
    if (!active) continue;
    read_piece(s, table, base, least, most, last, kv, key_cache, value_cache, m);
    int64_t a = 0;
    for (; a + 4 <= active; a += 4) scores<4>(&q[a], m.keys.data(), s.dim, &w[a]);
    for (; a + 2 <= active; a += 2) scores<2>(&q[a], m.keys.data(), s.dim, &w[a]);
    for (; a < active; ++a) scores<1>(&q[a], m.keys.data(), s.dim, &w[a]);
    for (a = 0; a < active; ++a) {
      const int64_t c = (w[a] - m.weights.data()) / PIECE;
      F x[VECS], top = splat(-INFINITY);
      for (int v = 0; v < VECS; ++v) {
        const I lane = I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + int32_t(v * LANES);
        x[v] = load(w[a] + v * LANES) * splat(s.scale);
        if (s.cap > 0) x[v] = splat(s.cap) * tanh(x[v] / splat(s.cap));
        x[v] = (lane >= low[a]) & (lane <= high[a]) ? x[v] : splat(-INFINITY);
        top = max(top, x[v]);
      }
      const float old = m.top[c], now = std::max(old, max(top));
      F part = {};
      for (int v = 0; v < VECS; ++v) {
        x[v] = exp(x[v] - splat(now));
        part = part + x[v];
        store(w[a] + v * LANES, x[v]);
      }
      fade[a] = exp(old - now);
      m.total[c] = m.total[c] * fade[a] + sum(part);
      m.top[c] = now;
    }
    // Rows go together where they see the same keys; what a row doesn't see isn't touched, be it NaN.
    for (a = 0; a < active;) {
      int64_t same = 1;
      while (same < 4 && a + same < active && low[a + same] == low[a] && high[a + same] == high[a]) ++same;
      const float* values = m.values.data();
      if (same == 4)
        blend_all<4>(&w[a], values, s.padded, low[a], high[a], &y[a], &fade[a]);
      else if (same >= 2)
        blend_all<2>(&w[a], values, s.padded, low[a], high[a], &y[a], &fade[a]), same = 2;
      else
        blend_all<1>(&w[a], values, s.padded, low[a], high[a], &y[a], &fade[a]);
      a += same;
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t h = 0; h < share; ++h) {
      const int64_t c = i * share + h, head = kv * share + h;
      float fading = 1.0f, total = m.total[c];
      if (sinks && positions[task.begin + i] >= 0) {
        const float now = std::max(m.top[c], sinks[head]);
        fading = exp(m.top[c] - now);
        total = total * fading + exp(sinks[head] - now);
      }
      T* out = result + ((task.begin + i) * s.heads + head) * s.dim;
      for (int64_t d = 0; d < s.dim; d += LANES) {
        F x = total > 0 || total != total ? load(m.out.data() + c * s.padded + d) * splat(fading) / splat(total) : F{};
        store(out + d, x, int(std::min<int64_t>(LANES, s.dim - d)));
      }
    }
}

}  // namespace

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                           const at::Tensor& tables, const at::Tensor& rows, const at::Tensor& positions, double scale,
                           int64_t window, double soft_cap, const std::optional<at::Tensor>& sinks) {
  const int64_t count = query.size(0);
  Shape s{query.size(1), key_cache.size(1), query.size(2), (query.size(2) + LANES - 1) / LANES * LANES,
          key_cache.size(2), tables.size(1), key_cache.size(0), float(scale), float(soft_cap), window};
  at::Tensor out = at::empty_like(query);
  const int32_t *row = rows.data_ptr<int32_t>(), *position = positions.data_ptr<int32_t>();
  const int32_t* table = tables.data_ptr<int32_t>();
  const float* sink = sinks ? sinks->data_ptr<float>() : nullptr;
  const int64_t sequences = tables.size(0), most = std::max<int64_t>(1, TASK_ROWS / (s.heads / s.kv_heads));
  std::vector<Task> tasks;
  for (int64_t t = 0; t < count; ++t) {
    if (position[t] >= 0) {
      TORCH_CHECK_INDEX(row[t] >= 0 && row[t] < sequences, "row ", t, " belongs to sequence ", row[t], " of ", sequences);
      TORCH_CHECK_INDEX(position[t] < s.max_blocks * s.block, "position ", position[t], " of row ", t,
                        " lies behind its table of ", s.max_blocks, " blocks of ", s.block);
      const int64_t from = window > 0 && position[t] + 1 > window ? (position[t] + 1 - window) / PIECE * PIECE : 0;
      for (int64_t b = from / s.block; b <= position[t] / s.block; ++b) {
        const int32_t block = table[row[t] * s.max_blocks + b];
        TORCH_CHECK_INDEX(block >= 0 && block < s.blocks, "block ", block, " of row ", t, " is none of ", s.blocks);
      }
    }
    if (tasks.empty() || row[tasks.back().begin] != row[t] || tasks.back().end - tasks.back().begin >= most)
      tasks.push_back({t, t + 1});
    else
      tasks.back().end = t + 1;
  }
  const int64_t all = int64_t(tasks.size()) * s.kv_heads;
  if (all == 0) return out;
  by_dtype(query.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_cache<T>(key_cache.scalar_type(), [&](auto* row_type) {
      using C = std::remove_pointer_t<decltype(row_type)>;
      const auto* q = static_cast<const T*>(query.const_data_ptr());
      const auto *k = static_cast<const C*>(key_cache.const_data_ptr()), *v = static_cast<const C*>(value_cache.const_data_ptr());
      auto* y = static_cast<T*>(out.mutable_data_ptr());
      std::atomic<int64_t> next{0};  // tasks are uneven: a thread takes the next one when it is done
      at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), all), 1, [&](int64_t, int64_t) {
        Scratch scratch;
        for (int64_t i; (i = next.fetch_add(1)) < all;) {
          const Task& task = tasks[i / s.kv_heads];
          run_task(s, task, i % s.kv_heads, q, k, v, table + std::max<int64_t>(row[task.begin], 0) * s.max_blocks, position,
                   sink, y, scratch);
        }
      });
    });
  });
  return out;
}

void write_cache(const at::Tensor& key, const at::Tensor& value, at::Tensor key_cache, at::Tensor value_cache,
                 const at::Tensor& slots) {
  const int64_t heads = key_cache.size(1), block = key_cache.size(2), total = key_cache.size(0) * block, dim = key.size(2);
  const int64_t* slot = slots.data_ptr<int64_t>();
  for (int64_t t = 0; t < key.size(0); ++t)
    TORCH_CHECK_INDEX(slot[t] < total, "slot ", slot[t], " is behind the cache's ", total);
  by_dtype(key.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_cache<T>(key_cache.scalar_type(), [&](auto* row_type) {
      using C = std::remove_pointer_t<decltype(row_type)>;
      const int64_t width = row_width<C>(dim);
      auto *k = static_cast<C*>(key_cache.mutable_data_ptr()), *v = static_cast<C*>(value_cache.mutable_data_ptr());
      const auto *from_k = static_cast<const T*>(key.const_data_ptr()), *from_v = static_cast<const T*>(value.const_data_ptr());
      at::parallel_for(0, key.size(0), 16, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t h = 0; slot[t] >= 0 && h < heads; ++h) {
            const int64_t to = (((slot[t] / block) * heads + h) * block + slot[t] % block) * width;
            put_row(k + to, from_k + (t * heads + h) * dim, dim);
            put_row(v + to, from_v + (t * heads + h) * dim, dim);
          }
      });
    });
  });
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor tables, Tensor rows, Tensor positions, "
      "float scale, int window, float soft_cap, Tensor? sinks) -> Tensor",
      &quasar::paged_attention);
  m.def("write_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()",
        &quasar::write_cache);
}
