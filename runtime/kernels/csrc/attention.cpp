// Paged attention and the write to its cache.
//
// A task is a run of rows of one sequence with one head of keys, and goes through context in pieces of 64 keys, which serve
// every row and every query head that shares them. A row's own order of operations is fixed: products of a score in order of
// the dimension, in pairs where that is faster (`in_pairs`), pieces from the first to the last, keys within a piece from the
// first to the last. Keys are turned, so that sixteen scores are computed side by side, four bytes at a time whatever
// they hold; `rows.h` has the layout of a row.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "blend.h"
#include "pieces.h"
#include "team.h"

namespace quasar {
namespace {

constexpr int TASK_ROWS = 64;  // query vectors (rows times heads) of one task, about

struct Task {
  int64_t begin, end;  // rows
};

template <class T, class C>
void run_task(const Shape& s, const Task& task, int64_t kv, const T* query, const C* key_cache, const C* value_cache,
              const int32_t* table, const int32_t* positions, const float* sinks, T* result, Scratch& m) {
  const int64_t share = s.heads / s.kv_heads, rows = task.end - task.begin, count = rows * share;
  // Values that many rows want, or that don't fill vectors, are made floats once.
  const bool direct = count <= 16 && s.dim % LANES == 0;
  m.query.assign(count * s.padded, 0.0f);
  m.weights.resize(count * PIECE);
  m.out.assign(count * s.padded, 0.0f);
  m.top.assign(count, -INFINITY);
  m.total.assign(count, 0.0f);
  m.keys.resize(s.padded * PIECE);
  m.values.resize(PIECE * s.padded);
  m.q.resize(count), m.w.resize(count), m.y.resize(count), m.fade.resize(count), m.low.resize(count), m.high.resize(count);
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
    for (int64_t h = 0; h < share; ++h) {
      const T* from = query + ((task.begin + i) * s.heads + kv * share + h) * s.dim;
      float* to = m.query.data() + (i * share + h) * s.padded;
      if constexpr (in_pairs<C>) std::memcpy(to, from, s.dim * sizeof(T));
      else std::copy(from, from + s.dim, to);
    }
  }
  Piece<C> piece;
  float* values[PIECE];
  for (int j = 0; j < PIECE; ++j) values[j] = m.values.data() + j * s.padded;
  for (int64_t number = last < 0 ? 1 : first / PIECE; number * PIECE <= last; ++number) {
    const int64_t base = number * PIECE;
    int64_t active = 0;
    int least = PIECE, most = -1;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = positions[task.begin + i], from = start(i);
      if (p < base || from >= base + PIECE) continue;
      for (int64_t h = 0; h < share; ++h, ++active) {
        const int64_t c = i * share + h;
        m.q[active] = m.query.data() + c * s.padded;
        m.w[active] = m.weights.data() + c * PIECE;
        m.y[active] = m.out.data() + c * s.padded;
        m.low[active] = int(std::max<int64_t>(from - base, 0));
        m.high[active] = int(std::min<int64_t>(p - base, PIECE - 1));
        least = std::min(least, m.low[active]);
        most = std::max(most, m.high[active]);
      }
    }
    if (!active) continue;
    find(s, table, base, least, last, kv, key_cache, value_cache, piece);
    turn_keys(s, least, most, piece, m.keys.data());
    auto score = [&]<int R>(int64_t a) {
      scores_of<R, C>(&m.q[a], m.keys.data(), piece.key_step, s.padded, &m.w[a], least / LANES, most / LANES);
    };
    int64_t a = 0;
    for (; a + 4 <= active; a += 4) score.template operator()<4>(a);
    for (; a + 2 <= active; a += 2) score.template operator()<2>(a);
    for (; a < active; ++a) score.template operator()<1>(a);
    for (a = 0; a < active; ++a) soften(s, a, m);
    if (direct) {
      blend_rows(s, active, piece.value, piece.value_step, m);
      continue;
    }
    widen_values(s, least, most, piece, values);
    blend_rows<float>(s, active, values, nullptr, m);
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
      parallel_for(all, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        for (int64_t i = begin; i < end; ++i) {
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
      parallel_for(key.size(0), 16, [&](int64_t begin, int64_t end) {
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
