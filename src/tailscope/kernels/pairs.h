// What our convolutions share: the processor multiplies pairs of bfloat16 and adds them up in float32 (vdpbf16ps).

#pragma once

#include <cstdint>
#include <immintrin.h>

constexpr int kChannels = 16;  // channels that are handled together: a register of float32
constexpr int kTaps = 3;       // rows and columns of the kernel

struct alignas(64) Pair {  // sixteen channels of two neighbours: a0 b0 a1 b1 ...
    uint16_t values[2 * kChannels];
};

inline __m256i load(const uint16_t* channels) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels)); }

inline void store(__m256bh channels, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)channels);
}

inline void interleave(__m256i a, __m256i b, Pair& to) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    _mm512_store_si512(to.values, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}
