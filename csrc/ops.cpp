// Registers the ops and checks their arguments; the kernels are in the other files. Only torch's stable ABI is used, so
// one library serves torch 2.11 and later. Fake kernels are registered from Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "log_mel.h"
#include "log_mel_cpu.h"
#include "resample_cpu.h"
#ifdef AJEPA_CUDA
#include "log_mel_cuda.h"
#include "resample_cuda.h"
#endif

namespace {

using ajepa::LogMel;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef AJEPA_CUDA
// Looks the function up in libtorch_cuda, which CPU builds of torch do not have. A weak symbol would stay unresolved,
// because torch loads its libraries with RTLD_LOCAL.
void* current_stream(int32_t device) {
  static const auto get = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* const found = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<int32_t (*)(int32_t, void**)>(found);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(device, &stream) == 0, "ajepa: torch did not return its current CUDA stream");
  return stream;
}
#endif

// ---- log_mel ----

void check_table(const Tensor& t, const Tensor& pcm, ScalarType type, int64_t least, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() >= least,
                  "log_mel_fwd: ", name, " has the wrong dtype, size or strides");
  STD_TORCH_CHECK(t.device() == pcm.device(), "log_mel_fwd: ", name, " is not on pcm's device");
}

LogMel describe(const Tensor& pcm, const std::optional<Tensor>& lengths, const Tensor& window, const Tensor& weights,
                const Tensor& intervals, const Tensor& twiddles, Tensor& out, int64_t n_fft,
                int64_t hop_length, int64_t first_sample, int64_t edge, int64_t frame_bias, int64_t frame_add, int64_t min_samples,
                int64_t n_frames, bool remove_dc, double preemphasis, int64_t waveform_norm, int64_t power, double floor,
                double log_scale, double log_shift, double top, bool take_log, double pad, double factor,
                int64_t n_samples) {
  STD_TORCH_CHECK(pcm.dim() == 2 && pcm.is_contiguous(), "log_mel_fwd: pcm must be contiguous [B, S]");
  const auto in = pcm.scalar_type(), dtype = out.scalar_type();
  STD_TORCH_CHECK(in == ScalarType::Short || in == ScalarType::Float, "log_mel_fwd: pcm must be int16 or float32");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "log_mel_fwd: out must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(out.dim() == 5 && out.is_contiguous() && out.size(0) == pcm.size(0) && out.device() == pcm.device(),
                  "log_mel_fwd: out must be contiguous [B, F, T, patch mels, patch frames] on pcm's device");
  STD_TORCH_CHECK(ajepa::has_transform(n_fft),
                  "log_mel_fwd: n_fft must be 16 times a product of 2, 3 and 5 in 128..8192, got ", n_fft);
  // The kernels' 32-bit arithmetic stays below 2^31: a frame's index is at most samples + frame_bias + first_sample.
  const auto below = [](int64_t bits, std::initializer_list<int64_t> values) {
    return std::all_of(values.begin(), values.end(), [=](int64_t x) { return x >> bits == 0 || x >> bits == -1; });
  };
  STD_TORCH_CHECK(hop_length > 0 && min_samples > 0 && below(30, {hop_length, min_samples, pcm.size(1), n_samples}) && n_samples >= 0 &&
                      below(29, {first_sample, frame_bias}) && (frame_add == 0 || frame_add == 1) && edge >= 0 && edge <= 3 &&
                      (power == 1 || power == 2) && waveform_norm >= 0 && waveform_norm <= 2,
                  "log_mel_fwd: hop_length, min_samples, first_sample, frame_bias, frame_add, edge, power, waveform_norm, "
                  "n_samples or the length of pcm is out of range");
  STD_TORCH_CHECK(below(30, {out.size(1), out.size(2), out.size(3), out.size(4)}) && below(30, {out.size(2) * out.size(4)}) &&
                      out.size(3) > 0 && out.size(4) > 0,
                  "log_mel_fwd: out must have patches that are not empty, and fewer than 2^30 frames");
  const int64_t n_mels = out.size(1) * out.size(3), n_intervals = intervals.size(0);
  STD_TORCH_CHECK(n_mels >= 1 && n_mels <= 256, "log_mel_fwd: out must hold 1 to 256 mel bands, got ", n_mels);
  check_table(window, pcm, ScalarType::Float, 2, "window");
  check_table(weights, pcm, ScalarType::Float, 8 * n_intervals, "weights");
  check_table(intervals, pcm, ScalarType::Int, 2 * (n_mels + 1), "intervals");
  check_table(twiddles, pcm, ScalarType::Float, 4 * ajepa::twiddle_rows(int(n_fft)), "twiddles");
  for (const Tensor* table : {&window, &weights, &intervals, &twiddles})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(table->data_ptr()) % 16 == 0, "log_mel_fwd: tables must be aligned to 16 bytes");
  STD_TORCH_CHECK(window.numel() <= n_fft, "log_mel_fwd: the window is longer than n_fft");
  if (lengths) check_table(*lengths, pcm, ScalarType::Long, pcm.size(0), "lengths");
  STD_TORCH_CHECK(n_frames >= 0 && n_frames <= out.size(2) * out.size(4),
                  "log_mel_fwd: out holds fewer frames than n_frames");

  LogMel p{};
  p.pcm = pcm.data_ptr(), p.lengths = lengths ? static_cast<const int64_t*>(lengths->data_ptr()) : nullptr;
  p.window = static_cast<const float*>(window.data_ptr()), p.weights = static_cast<const float*>(weights.data_ptr());
  p.intervals = static_cast<const int32_t*>(intervals.data_ptr());
  p.twiddles = static_cast<const float*>(twiddles.data_ptr());
  p.out = out.data_ptr();
  p.batch = pcm.size(0), p.samples = pcm.size(1);
  p.n_fft = int(n_fft), p.win_length = int(window.numel()), p.hop_length = int(hop_length);
  p.first_sample = int(first_sample), p.frame_bias = int(frame_bias), p.frame_add = int(frame_add);
  p.min_samples = int(min_samples), p.n_mels = int(n_mels), p.n_intervals = int(n_intervals), p.n_frames = int(n_frames);
  p.patch_mels = int(out.size(3)), p.patch_frames = int(out.size(4)), p.patches = int(out.size(2));
  p.patch_rows = int(out.size(1)), p.patch_mels_inverse = 65535 / p.patch_mels + 1;
  p.power = int(power), p.waveform_norm = int(waveform_norm);
  p.is_int16 = in == ScalarType::Short, p.remove_dc = remove_dc, p.take_log = take_log, p.edge = ajepa::Edge(edge);
  p.dtype = dtype == ScalarType::Float ? ajepa::Out::kFloat
            : dtype == ScalarType::Half ? ajepa::Out::kHalf : ajepa::Out::kBFloat16;
  p.preemphasis = float(preemphasis), p.scale = p.is_int16 ? 1.0f / 32768 : 1.0f, p.floor = float(floor);
  p.log_scale = float(log_scale), p.log_shift = float(log_shift), p.top = float(top);
  p.factor = float(factor), p.pad = float(pad), p.n_samples = int(n_samples);
  p.silence = take_log ? float(std::log(floor) * log_scale + log_shift) : 0.0f;
  return p;
}

const ajepa::CpuKernel& cpu_kernel() {
#ifdef AJEPA_X86
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const char* limit = std::getenv("AJEPA_CPU_ISA");
  const std::string most = limit ? limit : "avx512";
  if (avx512 && most == "avx512") return ajepa::kAvx512Kernel;
  if (avx2 && most != "portable") return ajepa::kAvx2Kernel;
#endif
  return ajepa::kPortableKernel;
}

float* scratch(size_t floats) {  // scratch memory of this thread, kept between calls
  struct Free {
    void operator()(float* x) const { std::free(x); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    size = memory ? floats : 0;
  }
  return memory.get();
}

template <class T, class Load, class Store>
void limit_range(const LogMel& p, int64_t clip, float cutoff, Load load, Store store) {
  const int frames = p.all_frames(p.length(clip));
  for (int mel = 0; mel < p.n_mels; ++mel)
    for (int t = 0; t < frames; ++t) {
      T* at = static_cast<T*>(p.out) + p.out_index(clip, mel, t);
      if (load(*at) < cutoff) *at = store(cutoff);
    }
}

void log_mel_cpu(const LogMel& described) {
  LogMel p = described;
  const auto& kernel = cpu_kernel();
  const int64_t frames = int64_t(p.patches) * p.patch_frames, groups = (frames + kernel.lanes - 1) / kernel.lanes;
  std::vector<float> stats(p.waveform_norm ? 2 * p.batch : 0), peaks(p.top >= 0 ? groups * p.batch : 0);
  if (p.waveform_norm) {
    p.stats = stats.data();
    torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) { kernel.clip_stats(p, begin, end); });
  }
  if (p.top >= 0) p.peaks = peaks.data();
  std::atomic<bool> complete = true;  // no exception may pass through parallel_for's C interface
  torch::stable::parallel_for(0, p.batch * groups, 1, [&](int64_t begin, int64_t end) {
    if (float* memory = scratch(size_t(kernel.scratch_floats(p)))) kernel.run(p, begin, end, memory);
    else complete = false;
  });
  STD_TORCH_CHECK(complete, "log_mel_fwd: the CPU kernel could not allocate its scratch memory");
  if (p.top < 0) return;
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t clip = begin; clip < end; ++clip) {
      const float* peaks_of_clip = p.peaks + clip * groups;
      const float cutoff = *std::max_element(peaks_of_clip, peaks_of_clip + groups) - p.top;
      using torch::headeronly::BFloat16;
      using torch::headeronly::Half;
      const auto load = [](auto x) { return float(x); };
      if (p.dtype == ajepa::Out::kFloat) limit_range<float>(p, clip, cutoff, load, [](float x) { return x; });
      else if (p.dtype == ajepa::Out::kHalf) limit_range<Half>(p, clip, cutoff, load, [](float x) { return Half(x); });
      else limit_range<BFloat16>(p, clip, cutoff, load, [](float x) { return BFloat16(x); });
    }
  });
}

#define LOG_MEL_ARGS                                                                                                  \
  Tensor pcm, std::optional<Tensor> lengths, Tensor window, Tensor weights, Tensor intervals,                        \
      Tensor twiddles, Tensor out, int64_t n_fft, int64_t hop_length, int64_t first_sample, int64_t edge, int64_t frame_bias,         \
      int64_t frame_add, int64_t min_samples, int64_t n_frames, bool remove_dc, double preemphasis,                  \
      int64_t waveform_norm, int64_t power, double floor, double log_scale, double log_shift, double top, \
      bool take_log, double pad, double factor, int64_t n_samples
#define LOG_MEL_DESCRIBE                                                                                              \
  describe(pcm, lengths, window, weights, intervals, twiddles, out, n_fft, hop_length, first_sample, edge, frame_bias, \
           frame_add, min_samples, n_frames, remove_dc, preemphasis, waveform_norm, power, floor, log_scale,         \
           log_shift, top, take_log, pad, factor, n_samples)

void log_mel_fwd_cpu(LOG_MEL_ARGS) {
  const LogMel p = LOG_MEL_DESCRIBE;
  if (p.batch) log_mel_cpu(p);
}

#ifdef AJEPA_CUDA
void log_mel_fwd_cuda(LOG_MEL_ARGS) {
  LogMel p = LOG_MEL_DESCRIBE;
  if (!p.batch || !out.numel()) return;
  STD_TORCH_CHECK(p.batch <= 65535 || p.top < 0, "log_mel_fwd: top_db takes at most 65535 clips a call; split the batch");
  STD_TORCH_CHECK(p.batch <= INT32_MAX / (out.size(2) * out.size(4) / 16 + 1),
                  "log_mel_fwd: too many frames for one call; split the batch");
  const int32_t device = pcm.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // Allocated by torch's caching allocator, which also works while a CUDA graph is captured.
  std::optional<Tensor> stats, peaks;
  if (p.waveform_norm) {
    stats = torch::stable::new_empty(window, {p.batch, 2});
    p.stats = static_cast<float*>(stats->data_ptr());
  }
  if (p.top >= 0) {
    peaks = torch::stable::new_empty(window, {p.batch});
    p.peaks = static_cast<float*>(peaks->data_ptr());
  }
  const char* error = ajepa::log_mel_cuda(p, current_stream(device));
  STD_TORCH_CHECK(!*error, "log_mel_fwd: ", error);
}
#endif

// ---- resample ----

// The number of passes of a transform of `size` points; 0 if the radices do not multiply to `size`.
int count_passes(int64_t size, int64_t radices) {
  int passes = 0;
  for (uint64_t left = uint64_t(radices); left; left >>= 4, ++passes) {
    const int64_t radix = int64_t(left & 15);
    if (!((radix >= 2 && radix <= 5) || radix == 7 || radix == 8) || size % radix) return 0;
    size /= radix;
  }
  return size == 1 ? passes : 0;
}
int64_t twiddle_floats(int64_t size, int64_t radices) {
  int64_t floats = 0;
  for (uint64_t left = uint64_t(radices); left; left >>= 4) {
    const int64_t radix = int64_t(left & 15);
    floats += 2 * (size / radix) * (radix - 1), size /= radix;
  }
  return floats;
}

#define RESAMPLE_ARGS                                                                                                 \
  Tensor pcm, std::optional<Tensor> lengths, Tensor rows, Tensor twiddles, Tensor response, Tensor positions,        \
      Tensor out, int64_t up, int64_t down, int64_t half, int64_t phases, bool interpolated, int64_t size_in,        \
      int64_t size_out, int64_t hop, int64_t radices_in, int64_t radices_out, int64_t first, int64_t offset
#define RESAMPLE_DESCRIBE                                                                                             \
  describe_resample(pcm, lengths, rows, twiddles, response, positions, out, up, down, half, phases, interpolated,    \
                    size_in, size_out, hop, radices_in, radices_out, first, offset)

ajepa::Resample describe_resample(RESAMPLE_ARGS) {
  constexpr int64_t kMost = int64_t(1) << 40;  // limit of samples: products with rates below 2^19 fit 64 bits
  STD_TORCH_CHECK(pcm.dim() == 3 && pcm.is_contiguous(), "resample_fwd: pcm must be contiguous [B, T, C]");
  const auto in = pcm.scalar_type(), dtype = out.scalar_type();
  STD_TORCH_CHECK((in == ScalarType::Short || in == ScalarType::Float) &&
                      (dtype == ScalarType::Short || dtype == ScalarType::Float),
                  "resample_fwd: pcm and out must be int16 or float32");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == pcm.size(0) && out.device() == pcm.device(),
                  "resample_fwd: out must be contiguous [B, count] on pcm's device");
  STD_TORCH_CHECK(pcm.size(2) >= 1 && pcm.size(2) < 65536, "resample_fwd: pcm must have 1 to 65535 channels");
  STD_TORCH_CHECK(up >= 1 && up < 1 << 19 && down >= 1 && down < 1 << 19 && half >= 0 && half < 1 << 24,
                  "resample_fwd: a rate or the filter's length is out of range");
  STD_TORCH_CHECK(first >= 0 && first < kMost && out.size(1) < kMost && pcm.size(1) < kMost && offset > -kMost && offset < kMost,
                  "resample_fwd: first, offset, pcm or out is out of range");
  const auto check = [&](const Tensor& t, ScalarType type, int64_t least, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() >= least && t.device() == pcm.device(),
                    "resample_fwd: ", name, " has the wrong dtype, size, strides or device");
  };
  if (lengths) check(*lengths, ScalarType::Long, pcm.size(0), "lengths");
  ajepa::Resample p{};
  p.pcm = pcm.data_ptr(), p.lengths = lengths ? static_cast<const int64_t*>(lengths->data_ptr()) : nullptr;
  p.out = out.data_ptr();
  p.batch = pcm.size(0), p.samples = pcm.size(1), p.channels = int(pcm.size(2)), p.count = out.size(1);
  p.first = first, p.offset = offset, p.up = up, p.down = down, p.half = half;
  p.pcm_int16 = in == ScalarType::Short, p.out_int16 = dtype == ScalarType::Short;
  if (up == down) return p;
  if (!size_in) {
    p.width = int((2 * half + ajepa::kTapGroup - 1) / ajepa::kTapGroup * ajepa::kTapGroup), p.phases = int(phases);
    p.interpolated = interpolated;
    STD_TORCH_CHECK(half >= 1 && phases >= 1 && phases < 1 << 19 && (interpolated || phases == up),
                    "resample_fwd: phases is out of range");
    check(rows, ScalarType::Float, (phases + interpolated) * p.width, "rows");
    p.rows = static_cast<const float*>(rows.data_ptr());
    return p;
  }
  STD_TORCH_CHECK(size_in >= 2 && size_in < 1 << 20 && size_out >= 2 && size_out < 1 << 20 &&
                      count_passes(size_in, radices_in) && count_passes(size_out, radices_out),
                  "resample_fwd: the radices do not multiply to the sizes of the transforms");
  STD_TORCH_CHECK(hop >= 1 && hop % up == 0 && hop <= size_out && size_in * up == size_out * down &&
                      hop / up * down + 2 * half <= size_in,
                  "resample_fwd: hop is out of range");
  p.size_in = int(size_in), p.size_out = int(size_out), p.hop = int(hop), p.bins = int(positions.numel() / 2);
  p.radices_in = uint64_t(radices_in), p.radices_out = uint64_t(radices_out);
  check(twiddles, ScalarType::Float, twiddle_floats(size_in, radices_in) + twiddle_floats(size_out, radices_out), "twiddles");
  check(positions, ScalarType::Int, 2, "positions");
  check(response, ScalarType::Float, 2 * p.bins, "response");
  p.twiddles = static_cast<const float*>(twiddles.data_ptr()), p.response = static_cast<const float*>(response.data_ptr());
  p.positions = static_cast<const int32_t*>(positions.data_ptr());
  return p;
}

const ajepa::resample_cpu::Kernel& resample_kernel() {
#ifdef AJEPA_X86
  const auto* isa = &cpu_kernel();
  if (isa == &ajepa::kAvx512Kernel) return ajepa::resample_cpu::kAvx512Kernel;
  if (isa == &ajepa::kAvx2Kernel) return ajepa::resample_cpu::kAvx2Kernel;
#endif
  return ajepa::resample_cpu::kPortableKernel;
}

void resample_fwd_cpu(RESAMPLE_ARGS) {
  const ajepa::Resample p = RESAMPLE_DESCRIBE;
  uint32_t from = 0, to = 0;  // the largest places; unsigned, so that negative ones are out of range
  for (int i = 0; i < p.bins; ++i)
    from = std::max(from, uint32_t(p.positions[2 * i])), to = std::max(to, uint32_t(p.positions[2 * i + 1]));
  STD_TORCH_CHECK(!p.bins || (from < uint32_t(p.size_in) && to < uint32_t(p.size_out)),
                  "resample_fwd: positions are out of range");
  if (!p.batch || !p.count) return;
  const auto& kernel = resample_kernel();
  std::atomic<bool> complete = true;
  const auto run = [&](int64_t begin, int64_t end) {
    if (float* memory = scratch(size_t(kernel.scratch_floats(p)))) kernel.run(p, begin, end, memory);
    else complete = false;
  };
  if (p.batch == 1) run(0, 1);
  else torch::stable::parallel_for(0, p.batch, 1, run);
  STD_TORCH_CHECK(complete, "resample_fwd: the CPU kernel could not allocate its scratch memory");
}

#ifdef AJEPA_CUDA
void resample_fwd_cuda(RESAMPLE_ARGS) {
  const ajepa::Resample p = RESAMPLE_DESCRIBE;
  STD_TORCH_CHECK(!p.size_in, "resample_fwd: on CUDA only the direct method exists; size_in must be 0");
  if (!p.batch || !p.count) return;
  const int32_t device = pcm.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = ajepa::resample_cuda(p, current_stream(device));
  STD_TORCH_CHECK(!*error, "resample_fwd: ", error);
}
#endif

bool has_cuda() {
#ifdef AJEPA_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ajepa, m) {
  m.def(
      "log_mel_fwd(Tensor pcm, Tensor? lengths, Tensor window, Tensor weights, Tensor intervals, "
      "Tensor twiddles, Tensor(a!) out, int n_fft, int hop_length, int first_sample, int edge, int frame_bias, int frame_add, "
      "int min_samples, int n_frames, bool remove_dc, float preemphasis, int waveform_norm, int power, float floor, "
      "float log_scale, float log_shift, float top, bool take_log=True, float pad=0.0, float factor=1.0, "
      "int n_samples=0) -> ()");
  m.def(
      "resample_fwd(Tensor pcm, Tensor? lengths, Tensor rows, Tensor twiddles, Tensor response, Tensor positions, "
      "Tensor(a!) out, int up, int down, int half, int phases, bool interpolated, int size_in, int size_out, int hop, "
      "int radices_in, int radices_out, int first, int offset) -> ()");
  m.def("has_cuda() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(ajepa, CPU, m) {
  m.impl("log_mel_fwd", TORCH_BOX(&log_mel_fwd_cpu));
  m.impl("resample_fwd", TORCH_BOX(&resample_fwd_cpu));
}
#ifdef AJEPA_CUDA
STABLE_TORCH_LIBRARY_IMPL(ajepa, CUDA, m) {
  m.impl("log_mel_fwd", TORCH_BOX(&log_mel_fwd_cuda));
  m.impl("resample_fwd", TORCH_BOX(&resample_fwd_cuda));
}
#endif
STABLE_TORCH_LIBRARY_IMPL(ajepa, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
}
