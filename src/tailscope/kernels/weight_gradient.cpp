// The gradient of a 3x3 convolution's weights (stride 1, padding 1), from bfloat16 channels-last activations.
//
//     dw[o][ky][kx][i] = sum over images n, rows y, columns c of  g[n][y][c][o] * x[n][y+ky-1][c+kx-1][i]
//
// The sum runs over pixels, so the pairs that the processor multiplies are neighbouring pixels of a row, while channels-last
// memory keeps channels together: both arrays are interleaved first, some images at a time, so that the interleaved copies
// stay in the cache. Compiled when first needed, by tailscope/kernels/build.py, and called through ctypes.

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef __AVX512BF16__
#include "pairs.h"

namespace {

constexpr int kHalf = kChannels / 2;      // input channels of a tile: three columns of them fill 24 of 32 registers
constexpr int64_t kPixelsAtATime = 1024;  // their interleaved copies fit into the second-level cache

struct alignas(64) Sums {  // of one input channel and tap, for sixteen output channels
    float values[kChannels];
};

struct Shape {
    int64_t height, width, in, out;
    int64_t in_blocks() const { return in / kChannels; }
    int64_t out_blocks() const { return out / kChannels; }
    int64_t tiles() const { return out_blocks() * in_blocks() * kTaps * 2; }
    static constexpr int64_t kSumsPerTile = kTaps * kHalf;
};

// Fetches the next images into the cache, a line at a time, while the present ones are worked on.
struct Ahead {
    const uint16_t *at, *end;
    void fetch() {
        if (at < end) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1), at += 2 * kChannels;
    }
};

// x[rows][width][in] -> to[in block][rows][width + 1]: element c pairs the columns c-1 and c, with zeros outside.
void interleave_inputs(const uint16_t* x, int64_t rows, const Shape& s, Pair* to) {
    for (int64_t block = 0; block < s.in_blocks(); ++block)
        for (int64_t row = 0; row < rows; ++row) {
            const uint16_t* from = x + row * s.width * s.in + block * kChannels;
            __m256i before = _mm256_setzero_si256();
            for (int64_t c = 0; c < s.width; ++c) {
                const __m256i here = load(from + c * s.in);
                interleave(before, here, *to++);
                before = here;
            }
            interleave(before, _mm256_setzero_si256(), *to++);
        }
}

// g[rows][width][out] -> to[out block][rows][width / 2]: element c pairs the columns 2c and 2c+1.
void interleave_gradients(const uint16_t* g, int64_t rows, const Shape& s, Pair* to) {
    for (int64_t block = 0; block < s.out_blocks(); ++block)
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t c = 0; c < s.width; c += 2) {
                const uint16_t* from = g + (row * s.width + c) * s.out + block * kChannels;
                interleave(load(from), load(from + s.out), *to++);
            }
}

// Add to 24 sums what some images contribute for one row of taps, sixteen output and eight input channels.
void add_tile(const Pair* g, const Pair* x, int half, int ky, int64_t images, const Shape& s, Sums* sums, Ahead& ahead) {
    __m512 sum[kTaps][kHalf];  // stays in registers only where every loop over it is unrolled
#pragma GCC unroll 3
    for (int kx = 0; kx < kTaps; ++kx)
#pragma GCC unroll 8
        for (int i = 0; i < kHalf; ++i) sum[kx][i] = _mm512_load_ps(sums[kx * kHalf + i].values);
    const int64_t first = ky == 0, last = ky == 2 ? s.height - 1 : s.height;
    for (int64_t image = 0; image < images; ++image)
        for (int64_t y = first; y < last; ++y) {
            const Pair* along_g = g + (image * s.height + y) * (s.width / 2);
            const auto* along_x = reinterpret_cast<const int32_t*>(x + (image * s.height + y + ky - 1) * (s.width + 1));
            along_x += half * kHalf;
            for (int64_t c = 0; c < s.width / 2; ++c, ++along_g, along_x += 2 * kChannels) {
                ahead.fetch();
                // Without this line the compiler keeps broadcasts for the next turn, and runs out of registers.
                asm volatile("" ::: "memory");
                const __m512bh gradient = (__m512bh)_mm512_load_si512(along_g);
#pragma GCC unroll 3
                for (int kx = 0; kx < kTaps; ++kx)
#pragma GCC unroll 8
                    for (int i = 0; i < kHalf; ++i) {
                        const __m512i input = _mm512_set1_epi32(along_x[kx * kChannels + i]);
                        sum[kx][i] = _mm512_dpbf16_ps(sum[kx][i], gradient, (__m512bh)input);
                    }
            }
        }
#pragma GCC unroll 3
    for (int kx = 0; kx < kTaps; ++kx)
#pragma GCC unroll 8
        for (int i = 0; i < kHalf; ++i) _mm512_store_ps(sums[kx * kHalf + i].values, sum[kx][i]);
}

// Sum over some images into sums[tile][column of taps][input channel].
void sum_images(const uint16_t* x, const uint16_t* g, int64_t images, const Shape& s, Sums* sums) {
    const int64_t pixels = s.height * s.width, at_a_time = std::max<int64_t>(1, kPixelsAtATime / pixels);
    const int64_t most_rows = std::min(at_a_time, images) * s.height;
    std::vector<Pair> inputs(most_rows * (s.width + 1) * s.in_blocks()), gradients(most_rows * s.width / 2 * s.out_blocks());
    for (int64_t start = 0; start < images; start += at_a_time) {
        const int64_t some = std::min(at_a_time, images - start), then = start + some;
        const int64_t rows = some * s.height, next = std::min(at_a_time, images - then);
        interleave_inputs(x + start * pixels * s.in, rows, s, inputs.data());
        interleave_gradients(g + start * pixels * s.out, rows, s, gradients.data());
        Ahead ahead[] = {{x + then * pixels * s.in, x + (then + next) * pixels * s.in},
                         {g + then * pixels * s.out, g + (then + next) * pixels * s.out}};
        for (int64_t tile = 0; tile < s.tiles(); ++tile) {
            const int half = tile % 2, ky = tile / 2 % kTaps;
            const int64_t in_block = tile / (2 * kTaps) % s.in_blocks(), out_block = tile / (2 * kTaps) / s.in_blocks();
            add_tile(&gradients[out_block * rows * s.width / 2], &inputs[in_block * rows * (s.width + 1)], half, ky, some,
                     s, sums + tile * Shape::kSumsPerTile, ahead[half]);
        }
    }
}

// Add up the threads' sums[tile][kx][i].values[o] into dw[o][ky][kx][i].
void gather(const std::vector<Sums>& sums, int threads, const Shape& s, float* dw) {
    const int64_t per_thread = s.tiles() * Shape::kSumsPerTile;
    for (int64_t at = 0; at < per_thread; ++at) {
        const int64_t i = at % kHalf, kx = at / kHalf % kTaps, tile = at / Shape::kSumsPerTile;
        const int64_t ky = tile / 2 % kTaps, block = tile / (2 * kTaps);
        const int64_t in = block % s.in_blocks() * kChannels + tile % 2 * kHalf + i;
        for (int64_t o = 0; o < kChannels; ++o) {
            float total = 0;
            for (int t = 0; t < threads; ++t) total += sums[t * per_thread + at].values[o];
            const int64_t out = block / s.in_blocks() * kChannels + o;
            dw[((out * kTaps + ky) * kTaps + kx) * s.in + in] = total;
        }
    }
}

}  // namespace

extern "C" int supported() { return 1; }

// in and out are multiples of 16, width is even; dw is [out][3][3][in].
extern "C" void weight_gradient(const uint16_t* x, const uint16_t* g, float* dw, int64_t images, int64_t height,
                                int64_t width, int64_t in, int64_t out, int threads) {
    const Shape shape{height, width, in, out};
    const int64_t per_thread = shape.tiles() * Shape::kSumsPerTile;
    std::vector<Sums> sums(threads * per_thread);  // zeros
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = images * t / threads, last = images * (t + 1) / threads;
        sum_images(x + first * height * width * in, g + first * height * width * out, last - first, shape,
                   &sums[t * per_thread]);
    }
    gather(sums, threads, shape, dw);
}

#else

extern "C" int supported() { return 0; }

#endif
