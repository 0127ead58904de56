// Batch normalisation, an optional shortcut and ReLU in one go, for channels-last activations on the CPU.
//
// Activations are [rows, channels] with rows = batch * height * width; channels is a multiple of 16. Everything is
// computed in float32 whatever the activations' type; sums over rows are carried on in double. Compiled when first
// needed, by tailscope/networks/norm_act.py, and called through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kRowsPerPartialSum = 1024;  // float32 sums stay this short, so that rounding does not grow

struct BFloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
    const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline void store(float value, float& to) { to = value; }

inline void store(float value, BFloat16& to) {  // round to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    to.bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// Call `body(first_row, last_row, thread)` on equal shares of the rows.
template <class Body>
void share_rows(int64_t rows, int threads, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) body(rows * t / threads, rows * (t + 1) / threads, t);
}

// Sum two quantities over rows for W channels. `term(offset, c, a, b)` adds to a and b what element `offset` of channel c
// contributes. Several rows at a time keep the adders busy.
template <int W, class Term>
void sum_rows(int64_t first, int64_t last, int64_t channels, double* total_a, double* total_b, const Term& term) {
    constexpr int kUnrolled = 64 / W;
    for (int64_t start = first; start < last; start += kRowsPerPartialSum) {
        const int64_t end = start + kRowsPerPartialSum < last ? start + kRowsPerPartialSum : last;
        float a[kUnrolled][W] = {}, b[kUnrolled][W] = {};
        int64_t row = start;
        for (; row + kUnrolled <= end; row += kUnrolled)
            for (int u = 0; u < kUnrolled; ++u)
#pragma omp simd
                for (int c = 0; c < W; ++c) term((row + u) * channels + c, c, a[u][c], b[u][c]);
        for (; row < end; ++row)
#pragma omp simd
            for (int c = 0; c < W; ++c) term(row * channels + c, c, a[0][c], b[0][c]);
        for (int u = 0; u < kUnrolled; ++u)
            for (int c = 0; c < W; ++c) {
                total_a[c] += a[u][c];
                total_b[c] += b[u][c];
            }
    }
}

// Run `block(offset, width)` for blocks of 64, 32 or 16 channels, whichever is the widest that divides them.
template <class Block>
void for_channel_blocks(int64_t channels, const Block& block) {
    if (channels % 64 == 0)
        for (int64_t c = 0; c < channels; c += 64) block(c, std::integral_constant<int, 64>());
    else if (channels % 32 == 0)
        for (int64_t c = 0; c < channels; c += 32) block(c, std::integral_constant<int, 32>());
    else
        for (int64_t c = 0; c < channels; c += 16) block(c, std::integral_constant<int, 16>());
}

struct Sums {
    std::vector<double> a, b;
    Sums(int threads, int64_t channels) : a(threads * channels), b(threads * channels), threads(threads), channels(channels) {}
    double of(const std::vector<double>& parts, int64_t c) const {
        double total = 0;
        for (int t = 0; t < threads; ++t) total += parts[t * channels + c];
        return total;
    }
    int threads;
    int64_t channels;
};

// y = relu(x * scale + offset + shortcut), a scale and an offset for each channel.
template <class T>
void apply(const T* x, const T* shortcut, T* y, const float* scale, const float* offset, int64_t rows,
           int64_t channels, int threads) {
    share_rows(rows, threads, [&](int64_t first, int64_t last, int) {
        for_channel_blocks(channels, [&](int64_t block, auto width) {
            constexpr int W = decltype(width)::value;
            float by[W], plus[W];
            for (int c = 0; c < W; ++c) by[c] = scale[block + c], plus[c] = offset[block + c];
            for (int64_t row = first; row < last; ++row) {
                const T* __restrict from = x + row * channels + block;
                const T* __restrict added = shortcut + row * channels + block;
                T* __restrict to = y + row * channels + block;
#pragma omp simd
                for (int c = 0; c < W; ++c) {
                    const float value = load(from[c]) * by[c] + plus[c] + (shortcut ? load(added[c]) : 0.0f);
                    store(value < 0 ? 0 : value, to[c]);  // keeps NaN
                }
            }
        });
    });
}

inline void scale_and_offset(const float* weight, const float* bias, const float* mean, const float* rstd,
                             int64_t channels, float* scale, float* offset) {
    for (int64_t c = 0; c < channels; ++c) {
        scale[c] = weight[c] * rstd[c];
        offset[c] = bias[c] - mean[c] * scale[c];
    }
}

// Sum each channel's values and their squares, as deviations from the first row, which is returned: sums of the raw values
// would cancel where the mean is large.
template <class T>
std::vector<float> sum_deviations(const T* x, int64_t rows, int64_t channels, int threads, Sums& sums) {
    std::vector<float> origin(channels);
    for (int64_t c = 0; c < channels; ++c) origin[c] = load(x[c]);
    share_rows(rows, threads, [&](int64_t first, int64_t last, int t) {
        for_channel_blocks(channels, [&](int64_t block, auto width) {
            constexpr int W = decltype(width)::value;
            const T* __restrict values = x + block;
            float from[W];
            for (int c = 0; c < W; ++c) from[c] = origin[block + c];
            sum_rows<W>(first, last, channels, &sums.a[t * channels + block], &sums.b[t * channels + block],
                        [&](int64_t at, int c, float& sum, float& square) {
                            const float deviation = load(values[at]) - from[c];
                            sum += deviation;
                            square += deviation * deviation;
                        });
        });
    });
    return origin;
}

// `statistics` gets each channel's mean, inverse standard deviation and unbiased variance, as [3][channels].
template <class T>
void forward(const T* x, const T* shortcut, T* y, const float* weight, const float* bias, float* statistics,
             int64_t rows, int64_t channels, float eps, int threads) {
    float *mean = statistics, *rstd = statistics + channels, *unbiased = statistics + 2 * channels;
    std::vector<float> scale(channels), offset(channels);
    Sums sums(threads, channels);
    const std::vector<float> origin = sum_deviations(x, rows, channels, threads, sums);
    for (int64_t c = 0; c < channels; ++c) {
        const double shift = sums.of(sums.a, c) / rows;
        const double spread = sums.of(sums.b, c) / rows - shift * shift;
        const double variance = spread < 0 ? 0 : spread;  // keeps NaN
        mean[c] = static_cast<float>(origin[c] + shift);
        rstd[c] = static_cast<float>(1 / std::sqrt(variance + eps));
        unbiased[c] = static_cast<float>(rows > 1 ? variance * rows / (rows - 1) : variance);
    }
    scale_and_offset(weight, bias, mean, rstd, channels, scale.data(), offset.data());
    apply(x, shortcut, y, scale.data(), offset.data(), rows, channels, threads);
}

// The gradient that passes ReLU: what arrives where the result is positive or NaN. With a shortcut the result is read;
// without one it is computed again from x, which is read in any case.
template <class T, bool kShortcut>
struct Passing {
    const T *gradient, *y, *x;
    float operator()(int64_t at, float scale, float offset) const {
        const float result = kShortcut ? load(y[at]) : load(x[at]) * scale + offset;
        const float arriving = load(gradient[at]);  // read in any case: a load under a condition is not vectorised
        return result <= 0 ? 0 : arriving;
    }
};

// Gradients of x, of the shortcut, and of weight and bias. Where there is a shortcut, its gradient is what the second pass
// starts from.
template <class T, bool kShortcut>
void backward(const Passing<T, kShortcut>& passing, const float* weight, const float* bias, const float* mean,
              const float* rstd, T* gradient_x, T* gradient_shortcut, float* gradient_weight, float* gradient_bias,
              int64_t rows, int64_t channels, int threads) {
    const T* x = passing.x;
    std::vector<float> scale(channels), offset(channels);
    scale_and_offset(weight, bias, mean, rstd, channels, scale.data(), offset.data());
    Sums sums(threads, channels);
    share_rows(rows, threads, [&](int64_t first, int64_t last, int t) {
        for_channel_blocks(channels, [&](int64_t block, auto width) {
            constexpr int W = decltype(width)::value;
            float by[W], plus[W], center[W];
            for (int c = 0; c < W; ++c) by[c] = scale[block + c], plus[c] = offset[block + c], center[c] = mean[block + c];
            sum_rows<W>(first, last, channels, &sums.a[t * channels + block], &sums.b[t * channels + block],
                        [&](int64_t at, int c, float& sum, float& product) {
                            const float passed = passing(block + at, by[c], plus[c]);
                            if (kShortcut) store(passed, gradient_shortcut[block + at]);
                            sum += passed;
                            product += passed * (load(x[block + at]) - center[c]);
                        });
        });
    });
    std::vector<float> along(channels), constant(channels);
    for (int64_t c = 0; c < channels; ++c) {
        const double sum = sums.of(sums.a, c), product = sums.of(sums.b, c), r = rstd[c];
        gradient_bias[c] = static_cast<float>(sum);
        gradient_weight[c] = static_cast<float>(product * r);
        along[c] = static_cast<float>(-weight[c] * r * r * r * product / rows);
        constant[c] = static_cast<float>(-weight[c] * r * sum / rows - along[c] * static_cast<double>(mean[c]));
    }
    share_rows(rows, threads, [&](int64_t first, int64_t last, int) {
        for_channel_blocks(channels, [&](int64_t block, auto width) {
            constexpr int W = decltype(width)::value;
            float by[W], plus[W], slope[W], shift[W];
            for (int c = 0; c < W; ++c) {
                by[c] = scale[block + c], plus[c] = offset[block + c];
                slope[c] = along[block + c], shift[c] = constant[block + c];
            }
            for (int64_t row = first; row < last; ++row) {
                const int64_t at = row * channels + block;
#pragma omp simd
                for (int c = 0; c < W; ++c) {
                    const float passed = kShortcut ? load(gradient_shortcut[at + c]) : passing(at + c, by[c], plus[c]);
                    store(passed * by[c] + load(x[at + c]) * slope[c] + shift[c], gradient_x[at + c]);
                }
            }
        });
    });
}

}  // namespace

#define EXPORTED(name, T)                                                                                             \
    extern "C" void forward_##name(const T* x, const T* shortcut, const float* weight, const float* bias, T* y,       \
                                   float* statistics, int64_t rows, int64_t channels, float eps, int threads) {       \
        forward(x, shortcut, y, weight, bias, statistics, rows, channels, eps, threads);                              \
    }                                                                                                                 \
    extern "C" void apply_##name(const T* x, const T* shortcut, const float* scale, const float* offset, T* y,        \
                                 int64_t rows, int64_t channels, int threads) {                                       \
        apply(x, shortcut, y, scale, offset, rows, channels, threads);                                                \
    }                                                                                                                 \
    extern "C" void backward_##name(const T* gradient, const T* y, const T* x, const float* weight,                   \
                                    const float* bias, const float* statistics, T* gradient_x,                        \
                                    T* gradient_shortcut, float* gradient_weight, float* gradient_bias, int64_t rows, \
                                    int64_t channels, int threads) {                                                  \
        const float *mean = statistics, *rstd = statistics + channels;                                                \
        if (gradient_shortcut)                                                                                        \
            backward(Passing<T, true>{gradient, y, x}, weight, bias, mean, rstd, gradient_x, gradient_shortcut,       \
                     gradient_weight, gradient_bias, rows, channels, threads);                                        \
        else                                                                                                          \
            backward(Passing<T, false>{gradient, y, x}, weight, bias, mean, rstd, gradient_x, gradient_shortcut,      \
                     gradient_weight, gradient_bias, rows, channels, threads);                                        \
    }

EXPORTED(float32, float)
EXPORTED(bfloat16, BFloat16)
