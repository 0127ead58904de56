// A 3x3 convolution (padding 1, stride 1 or 2) of bfloat16 channels-last activations, and the gradient of its inputs.
//
//     y[n][r][c][o] = sum over ky, kx, i of  w[o][ky][kx][i] * x[n][S r + ky - 1][S c + kx - 1][i],  S the stride
//
// and the other way round for the gradient: that of y[n][r][c] adds to that of x[n][S r + ky - 1][S c + kx - 1].
//
// A tile is eight neighbouring pixels of the result and sixteen of its channels, which stay in eight registers. Each pair
// of source channels is broadcast once for the three columns of taps that it meets, so that multiplying, and not
// loading, is what takes the time. Sums are float32. Compiled when first needed, by tailscope/kernels/build.py, and
// called through ctypes.

#include <cstdint>
#include <vector>

#ifdef __AVX512BF16__
#include "pairs.h"

namespace {

constexpr int kPixels = 8;  // of a tile, side by side

struct Image {
    int64_t height, width, channels;
    int64_t pixels() const { return height * width; }
    int64_t values() const { return pixels() * channels; }
};

// at / by where that is a whole number, else something negative.
constexpr int64_t exactly(int64_t at, int by) { return at < 0 || at % by ? -1 : at / by; }

// Which pixels of source and result meet under a tap. The source is what is read: x going forward, the gradient of y going
// back. Counting along a row, pixel 0 of a tile's source lies at pixel 0 of its result, borders reach to both sides.
template <bool kGradient, int kStride>
struct Meeting {
    static constexpr int kInside = kGradient ? kPixels / kStride : kPixels * kStride;  // the tile's source pixels,
    static constexpr int kFirst = kGradient && kStride == 2 ? 0 : -1;                  // and with borders
    static constexpr int kLast = kGradient || kStride == 1 ? kInside : kInside - 1;
    static int64_t source_column(int64_t of_result) { return kGradient ? of_result / kStride : of_result * kStride; }
    // The pixel of the result that meets source pixel j; negative where none does.
    static constexpr int result_pixel(int j, int tap) {
        return static_cast<int>(kGradient ? kStride * j + tap - 1 : exactly(j + 1 - tap, kStride));
    }
    // The source's row that meets a row of the result; negative where none does.
    static int64_t source_row(int64_t of_result, int tap) {
        return kGradient ? exactly(of_result + 1 - tap, kStride) : kStride * of_result + tap - 1;
    }
};

// w[out][ky][kx][in] -> packed[block of result channels][ky][pair of source channels][kx].
template <bool kGradient>
std::vector<Pair> pack(const uint16_t* w, int64_t in, int64_t out) {
    const int64_t per_out = kTaps * kTaps * in, result = kGradient ? in : out, source = kGradient ? out : in;
    std::vector<Pair> packed(result / kChannels * kTaps * source / 2 * kTaps);
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i outs = _mm512_mullo_epi32(count, _mm512_set1_epi32(static_cast<int>(per_out / 2)));
    Pair* to = packed.data();
    for (int64_t block = 0; block < result; block += kChannels)
        for (int ky = 0; ky < kTaps; ++ky)
            for (int64_t pair = 0; pair < source; pair += 2)
                for (int kx = 0; kx < kTaps; ++kx, ++to) {
                    const uint16_t* at = w + (ky * kTaps + kx) * in;
                    if (kGradient)
                        at += pair * per_out + block, interleave(load(at), load(at + per_out), *to);
                    else
                        at += block * per_out + pair, _mm512_store_si512(to, _mm512_i32gather_epi32(outs, at, sizeof(int)));
                }
    return packed;
}

// Sums of a channel's values and of their squares, taken from the first pixel of an image: those of the raw values would
// cancel where the mean is large.
struct Moments {
    __m512 origin, sum, square;
    bool started = false;
    void add(__m512 value) {
        const __m512 deviation = _mm512_sub_ps(value, origin);
        sum = _mm512_add_ps(sum, deviation);
        square = _mm512_fmadd_ps(deviation, deviation, square);
    }
    void add(const __m512 (&values)[kPixels]) {
        if (!started) origin = values[0], sum = square = _mm512_setzero_ps(), started = true;
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) add(values[p]);
    }
    void carry_over(int64_t pixels, double* sums, double* squares) const {
        alignas(64) float o[kChannels], s[kChannels], q[kChannels];
        _mm512_store_ps(o, origin), _mm512_store_ps(s, sum), _mm512_store_ps(q, square);
        for (int c = 0; c < kChannels; ++c) {
            const double from = o[c];
            sums[c] += s[c] + pixels * from;
            squares[c] += q[c] + 2 * from * s[c] + pixels * from * from;
        }
    }
};

// Compute a tile. `source` is the first row of the image, at the column that the tile starts from.
template <class Meets, bool kLeft, bool kRight>
inline __attribute__((always_inline)) void compute_tile(const uint16_t* source, const Image& from, const Pair* weights,
                                                        int64_t row, __m512 (&sum)[kPixels]) {
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) sum[p] = _mm512_setzero_ps();
    constexpr int kStart = kLeft ? 0 : Meets::kFirst, kEnd = kRight ? Meets::kInside - 1 : Meets::kLast;
    const int64_t pairs = from.channels / 2;
    for (int ky = 0; ky < kTaps; ++ky, weights += kTaps * pairs) {
        const int64_t source_row = Meets::source_row(row, ky);
        if (source_row < 0 || source_row >= from.height) continue;
        const auto* along = reinterpret_cast<const int32_t*>(source + source_row * from.width * from.channels);
        for (int64_t pair = 0; pair < pairs; ++pair, ++along) {
            // Without this line the compiler keeps broadcasts for the next turn, and runs out of registers.
            asm volatile("" ::: "memory");
            __m512bh tap[kTaps];
#pragma GCC unroll 3
            for (int kx = 0; kx < kTaps; ++kx) tap[kx] = (__m512bh)_mm512_load_si512(weights + pair * kTaps + kx);
#pragma GCC unroll 18
            for (int j = kStart; j <= kEnd; ++j) {
                const __m512bh here = (__m512bh)_mm512_set1_epi32(along[j * pairs]);
#pragma GCC unroll 3
                for (int kx = 0; kx < kTaps; ++kx) {
                    const int p = Meets::result_pixel(j, kx);
                    if (p >= 0 && p < kPixels) sum[p] = _mm512_dpbf16_ps(sum[p], tap[kx], here);
                }
            }
        }
    }
}

// Compute some images. Where `totals` is not null, adds each channel's sum and, after them, each channel's sum of squares.
template <class Meets>
void compute(const uint16_t* source, const Image& from, const Pair* weights, uint16_t* result, const Image& to,
             int64_t images, double* totals) {
    const int64_t weights_per_block = kTaps * from.channels / 2 * kTaps;
    for (int64_t image = 0; image < images; ++image, source += from.values(), result += to.values())
        for (int64_t block = 0; block < to.channels; block += kChannels) {
            const Pair* of_block = weights + block / kChannels * weights_per_block;
            Moments moments;
            for (int64_t row = 0; row < to.height; ++row)
                for (int64_t column = 0; column < to.width; column += kPixels) {
                    __m512 sum[kPixels];
                    const uint16_t* at = source + Meets::source_column(column) * from.channels;
                    const bool left = column == 0, right = column + kPixels == to.width;
                    if (left && right) compute_tile<Meets, true, true>(at, from, of_block, row, sum);
                    else if (left) compute_tile<Meets, true, false>(at, from, of_block, row, sum);
                    else if (right) compute_tile<Meets, false, true>(at, from, of_block, row, sum);
                    else compute_tile<Meets, false, false>(at, from, of_block, row, sum);
                    uint16_t* pixels = result + (row * to.width + column) * to.channels + block;
#pragma GCC unroll 8
                    for (int p = 0; p < kPixels; ++p)
                        store(_mm512_cvtneps_pbh(sum[p]), pixels + p * to.channels);
                    if (totals) moments.add(sum);
                }
            if (totals) moments.carry_over(to.pixels(), totals + block, totals + to.channels + block);
        }
}

// Share the images out among threads. `totals` is [threads][2][channels of the result], zeros, or null.
template <bool kGradient, int kStride>
void share(const uint16_t* source, const Image& from, const uint16_t* w, uint16_t* result, const Image& to,
           int64_t images, double* totals, int threads) {
    const Image &x = kGradient ? to : from, &y = kGradient ? from : to;
    const auto packed = pack<kGradient>(w, x.channels, y.channels);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = images * t / threads, last = images * (t + 1) / threads;
        compute<Meeting<kGradient, kStride>>(source + first * from.values(), from, packed.data(),
                                             result + first * to.values(), to, last - first,
                                             totals ? totals + t * 2 * to.channels : nullptr);
    }
}

}  // namespace

extern "C" int supported() { return 1; }

// x[images][height][width][in], w[out][3][3][in] -> y[images][height / stride][width / stride][out]. The width of y is a
// multiple of 8, in and out are multiples of 16; with stride 2, height and width are even.
extern "C" void convolve(const uint16_t* x, const uint16_t* w, uint16_t* y, double* totals, int64_t images, int64_t height,
                         int64_t width, int64_t in, int64_t out, int64_t stride, int threads) {
    const Image from{height, width, in}, to{height / stride, width / stride, out};
    (stride == 1 ? share<false, 1> : share<false, 2>)(x, from, w, y, to, images, totals, threads);
}

// The gradient of x, whose height, width and channels are given, from that of y.
extern "C" void input_gradient(const uint16_t* g, const uint16_t* w, uint16_t* of_x, int64_t images, int64_t height,
                               int64_t width, int64_t in, int64_t out, int64_t stride, int threads) {
    const Image from{height / stride, width / stride, out}, to{height, width, in};
    (stride == 1 ? share<true, 1> : share<true, 2>)(g, from, w, of_x, to, images, nullptr, threads);
}

#else

extern "C" int supported() { return 0; }

#endif
