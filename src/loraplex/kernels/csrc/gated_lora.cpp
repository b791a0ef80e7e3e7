// The gated multi-adapter kernel for CPUs, made for few tokens a segment (decoding).
//
//   y[t] += lora_b[slot]^T (gate[t] * scaling[slot] * lora_a[slot] x[t])
//
// Adapters keep their own ranks: a table holds a pointer to each slot's factors, so nothing is padded,
// stacked or copied, and each active adapter's bytes are read once. Two phases, each split over threads:
//   shrink  h = gate * scaling * lora_a x      over (segment, block of rank rows)
//   expand  y += h lora_b                      over output columns, so that no two threads write one value
// Sums are float32 whatever the weights are; a token's result never depends on its neighbours.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Floats load(const c10::BFloat16* p) {  // a bfloat16 is the upper half of a float32
  Halves h;
  std::memcpy(&h, p, sizeof(h));
  Words w = __builtin_convertvector(h, Words) << 16;
  Floats v;
  std::memcpy(&v, &w, sizeof(v));
  return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(c10::BFloat16* p, Floats v) {  // round to nearest even, as torch does; NaN stays NaN
  Words w;
  std::memcpy(&w, &v, sizeof(w));
  Words rounded = (w + (0x7fff + ((w >> 16) & 1))) >> 16;
  Words quiet = (w >> 16) | 0x40;
  Words is_nan = reinterpret_cast<Words>(v != v);
  Halves h = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Halves);
  std::memcpy(p, &h, sizeof(h));
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

struct Segment {  // one adapter on the tokens [start, stop)
  int64_t start, stop;
  const void* lora_a;  // [rank, in]
  const void* lora_b;  // [rank, out]
  int64_t rank;
  float scaling;
  const float* gates;  // [stop - start]
  int64_t first_block;  // of rank rows, counted over all segments
  int64_t first_hidden;  // offset of this segment's h
};

constexpr int kRows = 4;  // rank rows that share one pass over x
constexpr int64_t kSmallWork = 8192;  // multiply-adds below which one thread does it all

// Adapters are many short, scattered rows: the hardware sees no stream in them, so each step asks for the next
// step's rows. [rows, bytes] with a stride, all in bytes.
inline void prefetch_rows(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
  const char* p = static_cast<const char*>(first);
  for (int64_t r = 0; r < rows; ++r, p += stride) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
}

template <typename T, int rows>
inline void dot_rows(const T* a, const T* x, int64_t in, float* out) {
  Floats acc[rows] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Floats xv = load(x + i);
    for (int r = 0; r < rows; ++r) acc[r] += load(a + r * in + i) * xv;
  }
  for (int r = 0; r < rows; ++r) {
    float tail = 0;
    for (int64_t j = i; j < in; ++j) tail += float(a[r * in + j]) * float(x[j]);
    out[r] = sum(acc[r]) + tail;
  }
}

// h[t, row .. row+kRows) of one segment
template <typename T>
void shrink_block(const Segment& s, int64_t row, const T* x, int64_t in, float* hidden) {
  const int64_t rows = std::min<int64_t>(kRows, s.rank - row);
  const T* a = static_cast<const T*>(s.lora_a) + row * in;
  for (int64_t t = s.start; t < s.stop; ++t) {
    const float gate = s.gates[t - s.start] * s.scaling;
    float* h = hidden + s.first_hidden + (t - s.start) * s.rank + row;
    if (gate == 0) {  // a closed gate leaves the token as it is, whatever its activations are
      std::fill(h, h + rows, 0.0f);
      continue;
    }
    float dots[kRows];
    if (rows == kRows) {
      dot_rows<T, kRows>(a, x + t * in, in, dots);
    } else {
      for (int64_t r = 0; r < rows; ++r) dot_rows<T, 1>(a + r * in, x + t * in, in, dots + r);
    }
    for (int64_t r = 0; r < rows; ++r) h[r] = gate * dots[r];
  }
}

template <typename T, int vectors>
inline void expand_vectors(const Segment& s, const float* h, int64_t column, T* y, int64_t out) {
  Floats acc[vectors];
  for (int v = 0; v < vectors; ++v) acc[v] = load(y + column + v * kLanes);
  const T* b = static_cast<const T*>(s.lora_b) + column;
  for (int64_t r = 0; r < s.rank; ++r, b += out) {
    for (int v = 0; v < vectors; ++v) acc[v] += h[r] * load(b + v * kLanes);
  }
  for (int v = 0; v < vectors; ++v) store(y + column + v * kLanes, acc[v]);
}

// y[t, begin .. end) of every token of one segment
template <typename T>
void expand_columns(const Segment& s, int64_t begin, int64_t end, const float* hidden, T* y_all, int64_t out) {
  constexpr int kWide = 8;
  for (int64_t t = s.start; t < s.stop; ++t) {
    if (s.gates[t - s.start] * s.scaling == 0) continue;
    const float* h = hidden + s.first_hidden + (t - s.start) * s.rank;
    T* y = y_all + t * out;
    int64_t c = begin;
    for (; c + kWide * kLanes <= end; c += kWide * kLanes) expand_vectors<T, kWide>(s, h, c, y, out);
    for (; c + kLanes <= end; c += kLanes) expand_vectors<T, 1>(s, h, c, y, out);
    for (; c < end; ++c) {
      float value = float(y[c]);
      for (int64_t r = 0; r < s.rank; ++r) value += h[r] * float(static_cast<const T*>(s.lora_b)[r * out + c]);
      y[c] = static_cast<T>(value);
    }
  }
}

template <typename T>
void run(const std::vector<Segment>& segments, int64_t num_blocks, int64_t num_hidden, const T* x, int64_t in,
         T* y, int64_t out) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < num_hidden) buffer.resize(num_hidden);
  float* hidden = buffer.data();
  const int64_t num_chunks = (out + kLanes - 1) / kLanes;
  auto shrink = [&](int64_t begin, int64_t end) {
    size_t i = 0;
    for (int64_t block = begin; block < end; ++block) {
      while (i + 1 < segments.size() && segments[i + 1].first_block <= block) ++i;
      const size_t next = i + 1 < segments.size() && segments[i + 1].first_block == block + 1 ? i + 1 : i;
      const int64_t next_row = next == i ? (block + 1 - segments[i].first_block) * kRows : 0;
      const int64_t rows = std::min<int64_t>(kRows, segments[next].rank - next_row);
      prefetch_rows(static_cast<const T*>(segments[next].lora_a) + next_row * in, 1, rows * in * sizeof(T), 0);
      shrink_block<T>(segments[i], (block - segments[i].first_block) * kRows, x, in, hidden);
    }
  };
  auto expand = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = std::min(end * kLanes, out);
    for (size_t i = 0; i < segments.size(); ++i) {
      if (i + 1 < segments.size()) {
        const Segment& next = segments[i + 1];
        prefetch_rows(static_cast<const T*>(next.lora_b) + first, next.rank, (last - first) * sizeof(T), out * sizeof(T));
      }
      expand_columns<T>(segments[i], first, last, hidden, y, out);
    }
  };
  // Threads are woken once for both phases: waking them costs as much as a small adapter's arithmetic.
  const int num_threads = num_hidden * in < kSmallWork ? 1 : at::get_num_threads();
  if (num_threads == 1) {
    shrink(0, num_blocks);
    expand(0, num_chunks);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    shrink(num_blocks * i / n, num_blocks * (i + 1) / n);
#pragma omp barrier
    expand(num_chunks * i / n, num_chunks * (i + 1) / n);
  }
}

// y [.., out] and x [.., in]: contiguous, the same number of tokens and the same dtype as the adapters.
// table [slots, modules, 3]: addresses of lora_a and lora_b, and the rank (0: this module is not adapted).
// scalings [slots, modules]. segments [n, 4]: start, stop, slot, first gate. gates: float32.
void gated_lora_(at::Tensor& y, const at::Tensor& x, const at::Tensor& table, const at::Tensor& scalings,
                 int64_t module, const at::Tensor& segments_tensor, const at::Tensor& gates) {
  TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), "gated_lora_: x and y must be contiguous");
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "gated_lora_: x and y differ in dtype");
  const int64_t in = x.size(-1), out = y.size(-1);
  const int64_t num_tokens = in == 0 ? 0 : x.numel() / in;
  TORCH_CHECK(y.numel() == num_tokens * out, "gated_lora_: x and y differ in their number of tokens");
  const int64_t modules = table.size(1);
  const int64_t* entries = table.const_data_ptr<int64_t>();
  const float* scaling = scalings.const_data_ptr<float>();
  const int64_t* rows = segments_tensor.const_data_ptr<int64_t>();
  const float* gate = gates.const_data_ptr<float>();

  thread_local std::vector<Segment> segments;
  segments.clear();
  int64_t num_blocks = 0, num_hidden = 0;
  for (int64_t i = 0; i < segments_tensor.size(0); ++i, rows += 4) {
    TORCH_CHECK(rows[0] >= 0 && rows[1] <= num_tokens && rows[2] >= 0 && rows[2] < table.size(0),
                "gated_lora_: segment ", i, " lies outside the batch or the table");
    const int64_t cell = rows[2] * modules + module;
    const int64_t rank = entries[cell * 3 + 2];
    if (rank == 0 || rows[0] >= rows[1]) continue;
    segments.push_back({rows[0], rows[1], reinterpret_cast<const void*>(entries[cell * 3]),
                        reinterpret_cast<const void*>(entries[cell * 3 + 1]), rank, scaling[cell],
                        gate + rows[3], num_blocks, num_hidden});
    num_blocks += (rank + kRows - 1) / kRows;
    num_hidden += rank * (rows[1] - rows[0]);
  }
  if (segments.empty()) return;
  if (x.scalar_type() == at::kFloat) {
    run<float>(segments, num_blocks, num_hidden, x.const_data_ptr<float>(), in, y.mutable_data_ptr<float>(), out);
  } else if (x.scalar_type() == at::kBFloat16) {
    run<c10::BFloat16>(segments, num_blocks, num_hidden, x.const_data_ptr<c10::BFloat16>(), in,
                       y.mutable_data_ptr<c10::BFloat16>(), out);
  } else {
    TORCH_CHECK(false, "gated_lora_: dtype ", x.scalar_type(), " is not supported; use float32 or bfloat16");
  }
}

}  // namespace

TORCH_LIBRARY(loraplex, m) {
  m.def(
      "gated_lora_(Tensor(a!) y, Tensor x, Tensor table, Tensor scalings, int module, Tensor segments, "
      "Tensor gates) -> ()");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) { m.impl("gated_lora_", gated_lora_); }
