// A decoder layer in two calls: at one row, calling its operations from Python one by one takes longer than norms, positions
// and attention do. They are the same functions, and so the same bits. Between the halves ranks add up what they have.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace quasar {

at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero, int64_t outputs, int64_t group, bool eight,
                       at::IntArrayRef borders, at::ScalarType dtype);
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool early,
                                            const std::optional<at::Tensor>& residual);
at::Tensor rotary_write(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                        const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm, double eps,
                        bool early, at::Tensor key_cache, at::Tensor value_cache, const at::Tensor& slots, int64_t dim);
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                           const at::Tensor& tables, const at::Tensor& rows, const at::Tensor& positions, double scale,
                           int64_t window, double soft_cap, const std::optional<at::Tensor>& sinks);
at::Tensor gated(const at::Tensor& both, bool is_gelu);

namespace {

// A packed weight: codes, scale and, if there is one, zero; and its outputs, group, and whether activations are rounded.
at::Tensor product(const at::Tensor& x, at::TensorList weight, at::IntArrayRef shape, at::IntArrayRef borders,
                   at::ScalarType dtype) {
  const std::optional<at::Tensor> zero = weight.size() > 2 ? std::optional<at::Tensor>(weight[2]) : std::nullopt;
  return int4_linear(x, weight[0], weight[1], zero, shape[0], shape[1], shape[2] != 0, borders, dtype);
}

}  // namespace

// x, update [T, W] -> what the output projection makes of this rank's heads [T, W], of dtype; x + update.
std::tuple<at::Tensor, at::Tensor> attention_half(
    const at::Tensor& x, const std::optional<at::Tensor>& update, const at::Tensor& norm, double eps, bool early,
    at::TensorList qkv, at::IntArrayRef qkv_shape, const std::optional<at::Tensor>& bias, const at::Tensor& cos,
    const at::Tensor& sin, const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm,
    double head_eps, bool head_early, const at::Tensor& key_cache, const at::Tensor& value_cache, const at::Tensor& slots,
    int64_t dim, const at::Tensor& tables, const at::Tensor& rows, const at::Tensor& positions, double scale, int64_t window,
    double soft_cap, const std::optional<at::Tensor>& sinks, at::TensorList output, at::IntArrayRef output_shape,
    at::IntArrayRef borders, at::ScalarType dtype) {
  const auto [normed, total] = rms_norm(x, norm, eps, early, update);
  at::Tensor projected = product(normed, qkv, qkv_shape, {}, x.scalar_type());
  if (bias) projected = at::add(projected, *bias);
  const at::Tensor query =
      rotary_write(projected, cos.contiguous(), sin.contiguous(), query_norm, key_norm, head_eps, head_early, key_cache,
                   value_cache, slots.contiguous(), dim);
  const at::Tensor heads = paged_attention(query, key_cache, value_cache, tables.contiguous(), rows.contiguous(),
                                           positions.contiguous(), scale, window, soft_cap, sinks);
  return {product(heads.view({x.size(0), -1}), output, output_shape, borders, dtype), total};
}

// x, update [T, W] -> what the down projection makes of this rank's gates and ups [T, W], of dtype; x + update.
std::tuple<at::Tensor, at::Tensor> mlp_half(const at::Tensor& x, const at::Tensor& update, const at::Tensor& norm, double eps,
                                            bool early, at::TensorList gate_up, at::IntArrayRef gate_up_shape, bool is_gelu,
                                            at::TensorList down, at::IntArrayRef down_shape, at::IntArrayRef borders,
                                            at::ScalarType dtype) {
  const auto [normed, total] = rms_norm(x, norm, eps, early, update);
  const at::Tensor both = product(normed, gate_up, gate_up_shape, {}, x.scalar_type());
  return {product(gated(both, is_gelu), down, down_shape, borders, dtype), total};
}

}  // namespace quasar

TORCH_LIBRARY_FRAGMENT(quasar, m) {
  m.def(
      "attention_half(Tensor x, Tensor? update, Tensor norm, float eps, bool early, Tensor[] qkv, int[] qkv_shape, "
      "Tensor? bias, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float head_eps, bool head_early, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, int dim, Tensor tables, Tensor rows, Tensor positions, "
      "float scale, int window, float soft_cap, Tensor? sinks, Tensor[] output, int[] output_shape, int[] borders, "
      "ScalarType dtype) -> (Tensor, Tensor)",
      &quasar::attention_half);
  m.def(
      "mlp_half(Tensor x, Tensor update, Tensor norm, float eps, bool early, Tensor[] gate_up, int[] gate_up_shape, "
      "bool is_gelu, Tensor[] down, int[] down_shape, int[] borders, ScalarType dtype) -> (Tensor, Tensor)",
      &quasar::mlp_half);
}
