// Decoder layers as objects, so that a pass is one call: at one row, calling a layer's operations from Python one by one takes
// longer than norms, positions and attention do. They are the same functions, and so the same bits; but whoever made a row rounds
// it for the next product at once, while it lies in his cache. Between the halves of a layer ranks add up what they have: here if
// they share memory, else a half at a time is called from Python.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <chrono>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "codes.h"
#include "shm.h"
#include "team.h"

namespace quasar {

at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef borders, at::ScalarType dtype);
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero, int64_t outputs, int64_t group, bool eight,
                       at::IntArrayRef borders, at::ScalarType dtype);
at::Tensor int4_codes(const Codes& x, const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& zero,
                      int64_t outputs, at::IntArrayRef borders, at::ScalarType dtype);
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool early,
                                            const std::optional<at::Tensor>& residual);
at::Tensor rotary_write(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                        const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm, double eps,
                        bool early, at::Tensor key_cache, at::Tensor value_cache, const at::Tensor& slots, int64_t dim);
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                           const at::Tensor& tables, const at::Tensor& rows, const at::Tensor& positions, double scale,
                           int64_t window, double soft_cap, const std::optional<at::Tensor>& sinks);
at::Tensor gated(const at::Tensor& both, bool is_gelu);
std::tuple<Codes, at::Tensor> norm_codes(const at::Tensor& x, const at::Tensor& weight, double eps, bool early,
                                         const std::optional<at::Tensor>& residual, int64_t group);
Codes gated_codes(const at::Tensor& both, bool is_gelu, int64_t group);

namespace {

using Given = std::optional<at::Tensor>;
using Both = std::tuple<at::Tensor, at::Tensor>;

// A weight, four-bit where it has scales, and the borders between segments of its inputs.
struct Product : torch::CustomClassHolder {
  at::Tensor weight;
  Given scale, zero, bias;
  int64_t outputs, group;
  bool eight;
  std::vector<int64_t> borders;

  Product(at::Tensor weight, Given scale, Given zero, Given bias, int64_t outputs, int64_t group, bool eight,
          std::vector<int64_t> borders)
      : weight(std::move(weight)), scale(std::move(scale)), zero(std::move(zero)), bias(std::move(bias)), outputs(outputs),
        group(group), eight(eight), borders(std::move(borders)) {}

  at::Tensor operator()(const at::Tensor& x, at::ScalarType dtype) const {
    const at::Tensor out = scale ? int4_linear(x, weight, *scale, zero, outputs, group, eight, borders, dtype)
                                 : dense_linear(x, weight, borders, dtype);
    return bias ? at::add(out, *bias) : out;
  }

  // Whether it takes what it multiplies rounded.
  bool rounds() const { return scale && eight; }

  at::Tensor operator()(const Codes& x, at::ScalarType dtype) const {
    const at::Tensor out = int4_codes(x, weight, *scale, zero, outputs, borders, dtype);
    return bias ? at::add(out, *bias) : out;
  }
};

struct Norm : torch::CustomClassHolder {
  Given weight;  // float32
  double eps;
  bool early;

  Norm(Given weight, double eps, bool early) : weight(std::move(weight)), eps(eps), early(early) {}

  // x, update [T, W] -> their sum, normed, times `product`; the sum.
  Both operator()(const at::Tensor& x, const Given& update, const Product& product) const {
    if (product.rounds()) {
      const auto [codes, total] = norm_codes(x, *weight, eps, early, update, product.group);
      return {product(codes, x.scalar_type()), total};
    }
    const auto [normed, total] = rms_norm(x, *weight, eps, early, update);
    return {product(normed, x.scalar_type()), total};
  }
};

// Rows of a round where a layer finds them: in the cache by slots, and by tables, rows of these, and positions.
struct Places : torch::CustomClassHolder {
  at::Tensor cos, sin, slots, tables, rows, positions;

  Places(const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& slots, const at::Tensor& tables,
         const at::Tensor& rows, const at::Tensor& positions)
      : cos(cos.contiguous()), sin(sin.contiguous()), slots(slots.contiguous()), tables(tables.contiguous()),
        rows(rows.contiguous()), positions(positions.contiguous()) {}
};

struct Layer : torch::CustomClassHolder {
  template <class T>
  using Held = c10::intrusive_ptr<T>;
  Held<Norm> first, query, key, second;
  Held<Product> qkv, output, gate_up, down;
  bool is_gelu, partial;  // partial: what other ranks' is added to, and so in float32
  double scale, soft_cap;
  int64_t dim, window;
  Given sinks;

  Layer(std::vector<Held<Norm>> norms, std::vector<Held<Product>> products, bool is_gelu, bool partial, int64_t dim,
        double scale, int64_t window, double soft_cap, Given sinks)
      : first(norms.at(0)), query(norms.at(1)), key(norms.at(2)), second(norms.at(3)), qkv(products.at(0)),
        output(products.at(1)), gate_up(products.at(2)), down(products.at(3)), is_gelu(is_gelu), partial(partial),
        scale(scale), soft_cap(soft_cap), dim(dim), window(window), sinks(std::move(sinks)) {}

  at::ScalarType part_of(const at::Tensor& x) const { return partial ? at::kFloat : x.scalar_type(); }

  // x, update [T, W] -> what the output projection makes of this rank's heads [T, W]; x + update.
  Both attention(const at::Tensor& x, const Given& update, const at::Tensor& key_cache, const at::Tensor& value_cache,
                 const Held<Places>& at) const {
    at::Tensor part, total;
    together([&] {
      at::Tensor all;
      std::tie(all, total) = (*first)(x, update, *qkv);
      const at::Tensor queries =
          rotary_write(all, at->cos, at->sin, query->weight, key->weight, query->eps,
                       query->early, key_cache, value_cache, at->slots, dim);
      const at::Tensor heads = paged_attention(queries, key_cache, value_cache, at->tables, at->rows, at->positions, scale,
                                               window, soft_cap, sinks);
      part = (*output)(heads.view({x.size(0), -1}), part_of(x));
    });
    return {part, total};
  }

  // x, update [T, W] -> what the down projection makes of this rank's gates and ups [T, W]; x + update.
  Both mlp(const at::Tensor& x, const at::Tensor& update) const {
    at::Tensor part, total;
    together([&] {
      at::Tensor both;
      std::tie(both, total) = (*second)(x, update, *gate_up);
      part = down->rounds() ? (*down)(gated_codes(both, is_gelu, down->group), part_of(x))
                            : (*down)(gated(both, is_gelu), part_of(x));
    });
    return {part, total};
  }
};

// The layers of a decoder and the norm behind them, handed over once, as a list takes a while to unpack with every pass.
struct Stack : torch::CustomClassHolder {
  std::vector<c10::intrusive_ptr<Layer>> layers;
  c10::intrusive_ptr<Norm> last;

  Stack(std::vector<c10::intrusive_ptr<Layer>> layers, c10::intrusive_ptr<Norm> last)
      : layers(std::move(layers)), last(std::move(last)) {
    TORCH_CHECK(!this->layers.empty(), "a decoder has layers");
  }
};

// All layers: x [T, W] -> what comes out of the last, normed, of rows `wanted` [L]; what an exchange came to that failed, or 0;
// seconds that all exchanges took. Parts are added up by `exchange`, which a rank that is alone doesn't need; a wait for others
// ends after `timeout` seconds.
std::tuple<at::Tensor, int64_t, double> run_layers(const c10::intrusive_ptr<Stack>& stack, at::Tensor x,
                                                   at::TensorList key_caches, at::TensorList value_caches,
                                                   const c10::intrusive_ptr<Places>& at, const at::Tensor& wanted,
                                                   const std::optional<c10::intrusive_ptr<Exchange>>& exchange,
                                                   double timeout) {
  using Clock = std::chrono::steady_clock;
  int64_t state = 0;
  Clock::duration spent{};
  auto summed = [&](const at::Tensor& part) {
    if (!exchange) return part;
    const at::Tensor out = at::empty_like(x);
    const Clock::time_point start = Clock::now();
    state = (*exchange)->all_reduce(part, out, timeout);
    spent += Clock::now() - start;
    return out;
  };
  Given update;
  together([&] {
    for (size_t i = 0; i < stack->layers.size() && state == 0; ++i) {
      const Layer* layer = stack->layers[i].get();
      std::tie(update, x) = layer->attention(x, update, key_caches[i], value_caches[i], at);
      update = summed(*update);
      if (state) break;
      std::tie(update, x) = layer->mlp(x, *update);
      update = summed(*update);
    }
    if (state) return;
    if (wanted.size(0) < x.size(0)) {
      x = at::index_select(x, 0, wanted);
      update = at::index_select(*update, 0, wanted);
    }
    const Norm& last = *stack->last;
    x = std::get<0>(rms_norm(x, *last.weight, last.eps, last.early, update));
  });
  return {x, state, std::chrono::duration<double>(spent).count()};
}

}  // namespace
}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  using namespace quasar;
  m.class_<Exchange>("Exchange")  // here, as a class must be known before a function that takes it
      .def(torch::init<at::Tensor, int64_t, int64_t, int64_t, int64_t>())
      .def("begin", &Exchange::begin)
      .def("end", &Exchange::end)
      .def("leave", &Exchange::leave);
  m.class_<Product>("Product")
      .def(torch::init<at::Tensor, Given, Given, Given, int64_t, int64_t, bool, std::vector<int64_t>>());
  m.class_<Norm>("Norm").def(torch::init<Given, double, bool>());
  m.class_<Places>("Places")
      .def(torch::init<const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       const at::Tensor&>());
  m.class_<Layer>("Layer")
      .def(torch::init<std::vector<c10::intrusive_ptr<Norm>>, std::vector<c10::intrusive_ptr<Product>>, bool, bool, int64_t,
                       double, int64_t, double, Given>())
      .def("attention", &Layer::attention)
      .def("mlp", &Layer::mlp);
  m.class_<Stack>("Stack").def(torch::init<std::vector<c10::intrusive_ptr<Layer>>, c10::intrusive_ptr<Norm>>());
  m.def("run_layers", &run_layers);
}
