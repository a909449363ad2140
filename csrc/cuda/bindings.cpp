// The operators' CUDA implementations: they check, allocate and launch, and compute nothing.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "checks.h"
#include "cuda/launch.h"
#include "walkable.h"

namespace rnnkern::cuda {
namespace {

// Whether float32 may be multiplied as TF32. Python sets it from PyTorch's own switch for RNNs, which the stable ABI
// does not show.
std::atomic<bool> tf32_allowed{false};

void allow_tf32(bool allowed) { tf32_allowed = allowed; }

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return tf32_allowed ? kTensorFloat32 : kFloat32;
    case torch::headeronly::ScalarType::Double:
      return kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(
          false, "the CUDA kernels serve float32, float64, bfloat16 and float16, got ",
          torch::headeronly::toString(tensor.scalar_type()));
  }
}

// RNNKERN_CUDA_REGIME names the regime that shall serve, for tests and measurements.
int asked_regime() {
  const char* const name = std::getenv("RNNKERN_CUDA_REGIME");
  if (name == nullptr || *name == 0) return -1;
  for (const Regime regime : {kLocal, kCluster, kGrid, kStep}) {
    if (name_of(regime) == name) return regime;
  }
  STD_TORCH_CHECK(false, "RNNKERN_CUDA_REGIME is '", name, "', expected cta, cluster, grid or step");
}

Rows rows_of(const Walkable& walkable) {
  const int64_t bytes = walkable.memory.element_size();
  return {static_cast<char*>(walkable.memory.data_ptr()), bytes * walkable.time_stride, bytes * walkable.row_stride};
}

int64_t padded(int64_t H) { return (H + 3) / 4 * 4; }

// The tensor with rows that the kernels can take as vectors of four units: a copy where H or an address is odd.
Walkable in_quads(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, H = tensor.size(last);
  const int64_t bytes = std::min<int64_t>(16, 4 * tensor.element_size());
  const auto fits = [&](const Walkable& w) {
    return reinterpret_cast<uintptr_t>(w.memory.data_ptr()) % bytes == 0 && w.time_stride % 4 == 0 &&
           w.row_stride % 4 == 0;
  };
  if (H % 4 != 0) return as_it_lies(torch::stable::pad(tensor, {0, padded(H) - H}));
  const Walkable lies = walkable(tensor);
  if (fits(lies)) return lies;
  Tensor copy = new_like(tensor);
  torch::stable::copy_(copy, tensor);
  return as_it_lies(copy);
}

// An output in quads: `tensor` itself, or what has to be copied back into it.
Walkable output_in_quads(const Tensor& tensor) {
  Shape sizes = shape(tensor);
  if (sizes.back() % 4 == 0) return as_it_lies(tensor);
  sizes.back() = padded(sizes.back());
  return as_it_lies(torch::stable::new_empty(tensor, sizes));
}

void bring_back(const Tensor& tensor, const Walkable& output) {
  if (output.memory.data_ptr() == tensor.data_ptr()) return;
  Tensor to = tensor, from = output.memory;
  const int64_t last = tensor.dim() - 1;
  torch::stable::copy_(to, torch::stable::narrow(from, last, 0, tensor.size(last)));
}

int narrowed(const char* name, int64_t size) {
  STD_TORCH_CHECK(size < (int64_t{1} << 30), name, " is ", size, ", and the CUDA kernels count to 2^30");
  return static_cast<int>(size);
}

struct Call {
  Job job;
  std::vector<int64_t> offsets;
};

// What forward and backward share.
void fill(
    Call& call, const Tensor& rows, const Tensor& w_hh, const Sequence& sequence, bool backward, bool reverse,
    const std::string& nonlinearity) {
  Job& job = call.job;
  job.kind = kind_of(rows);
  job.backward = backward;
  job.w_hh = {w_hh.data_ptr(), w_hh.stride(0), w_hh.stride(1)};
  Chain& chain = job.chain;
  chain.T = narrowed("T", sequence.T);
  chain.B = narrowed("B", sequence.B);
  chain.H = narrowed("H", padded(sequence.H));
  chain.hidden_size = static_cast<int>(sequence.H);
  chain.relu = nonlinearity == "relu";
  chain.backward_in_time = backward != reverse;
  if (!sequence.batch_sizes.empty()) {
    call.offsets = sequence.offsets;
    call.offsets.push_back(rows.size(0));
    job.offsets = &call.offsets;
  }
}

void run(const Job& job, const Tensor& like) {
  const std::string failure = earlier_failure();
  STD_TORCH_CHECK(failure.empty(), failure);
  const int device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  const bool known = aoti_torch_get_current_cuda_stream(device, &stream) == 0;
  STD_TORCH_CHECK(known, "PyTorch has no current CUDA stream for device ", device);
  const Plan plan = plan_for(job, device, asked_regime());
  const Shape bytes{static_cast<int64_t>(workspace_of(job, plan).total)};
  const Tensor workspace = torch::stable::new_empty(like, bytes, torch::headeronly::ScalarType::Byte);
  rnnkern::cuda::launch(job, plan, device, static_cast<char*>(workspace.data_ptr()), stream);
}

void launch_forward(
    const Tensor& z, const Tensor& h0, const Tensor& w_hh, const Sequence& sequence, bool reverse,
    const std::string& nonlinearity, const Tensor& h) {
  if (z.numel() == 0) return;
  Call call{};
  fill(call, z, w_hh, sequence, false, reverse, nonlinearity);
  const Walkable z_rows = in_quads(z), h0_rows = in_quads(h0);
  // In place, h goes where z lies, unless z had to be copied.
  const Walkable h_rows = h.data_ptr() == z.data_ptr() ? z_rows : output_in_quads(h);
  Chain& chain = call.job.chain;
  chain.input = rows_of(z_rows);
  chain.initial = rows_of(h0_rows);
  chain.output = rows_of(h_rows);
  run(call.job, z);
  bring_back(h, h_rows);
}

Tensor recurrence_op(
    const Tensor& z, const Tensor& h0, const Tensor& w_hh, std::optional<Tensor> batch_sizes, bool reverse,
    std::string nonlinearity) {
  const Sequence sequence = check_recurrence("z", z, h0, w_hh, batch_sizes, nonlinearity);
  const Tensor h = new_like(z);
  launch_forward(z, h0, w_hh, sequence, reverse, nonlinearity, h);
  return h;
}

void recurrence_in_place_op(
    Tensor z, const Tensor& h0, const Tensor& w_hh, std::optional<Tensor> batch_sizes, bool reverse,
    std::string nonlinearity) {
  const Sequence sequence = check_recurrence("z", z, h0, w_hh, batch_sizes, nonlinearity);
  STD_TORCH_CHECK(
      !overlaps_itself(z), "z must have an address of its own for every element to be written, got an expanded tensor");
  launch_forward(z, h0, w_hh, sequence, reverse, nonlinearity, z);
}

std::tuple<Tensor, Tensor> launch_backward(
    const Tensor& grad_h, const std::optional<Tensor>& grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    const std::optional<Tensor>& batch_sizes, bool reverse, const std::string& nonlinearity, double clip,
    Tensor* stats) {
  const Sequence sequence = check_recurrence_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, nonlinearity, clip);
  const Tensor delta = new_like(h), grad_h0 = new_like(h0);
  if (stats) {
    const Shape shape{4, sequence.T, sequence.B};
    *stats = torch::stable::new_zeros(h, shape, torch::headeronly::ScalarType::Double);
  }
  if (h.numel() == 0) {  // no step to carry the gradient through
    Tensor out = grad_h0;
    if (grad_hn) torch::stable::copy_(out, *grad_hn);
    else torch::stable::zero_(out);
    return {delta, grad_h0};
  }
  Call call{};
  fill(call, h, w_hh, sequence, true, reverse, nonlinearity);
  const Walkable grad_h_rows = in_quads(grad_h), h_rows = in_quads(h);
  const Walkable delta_rows = output_in_quads(delta), grad_h0_rows = output_in_quads(grad_h0);
  const Walkable grad_hn_rows = grad_hn ? in_quads(*grad_hn) : grad_h0_rows;
  Chain& chain = call.job.chain;
  chain.input = rows_of(grad_h_rows);
  chain.states = rows_of(h_rows);
  chain.output = rows_of(delta_rows);
  chain.final_ = rows_of(grad_h0_rows);
  chain.initial = grad_hn ? rows_of(grad_hn_rows) : Rows{};
  chain.clip = clip;
  call.job.stats = stats ? static_cast<double*>(stats->data_ptr()) : nullptr;
  run(call.job, h);
  bring_back(delta, delta_rows);
  bring_back(grad_h0, grad_h0_rows);
  return {delta, grad_h0};
}

std::tuple<Tensor, Tensor> recurrence_backward_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    std::optional<Tensor> batch_sizes, bool reverse, std::string nonlinearity, double clip) {
  return launch_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> recurrence_backward_stats_op(
    const Tensor& grad_h, std::optional<Tensor> grad_hn, const Tensor& h, const Tensor& h0, const Tensor& w_hh,
    std::optional<Tensor> batch_sizes, bool reverse, std::string nonlinearity, double clip) {
  Tensor stats;
  auto [delta, grad_h0] =
      launch_backward(grad_h, grad_hn, h, h0, w_hh, batch_sizes, reverse, nonlinearity, clip, &stats);
  return {delta, grad_h0, stats};
}

std::vector<int64_t> versions_op() {
  const Versions found = versions();
  return {found.driver, found.runtime};
}

}  // namespace
}  // namespace rnnkern::cuda

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CUDA, m) {
  m.impl("recurrence", TORCH_BOX(&rnnkern::cuda::recurrence_op));
  m.impl("recurrence_", TORCH_BOX(&rnnkern::cuda::recurrence_in_place_op));
  m.impl("recurrence_backward", TORCH_BOX(&rnnkern::cuda::recurrence_backward_op));
  m.impl("recurrence_backward_stats", TORCH_BOX(&rnnkern::cuda::recurrence_backward_stats_op));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("cuda_allow_tf32", TORCH_BOX(&rnnkern::cuda::allow_tf32));
  m.impl("cuda_versions", TORCH_BOX(&rnnkern::cuda::versions_op));
}
