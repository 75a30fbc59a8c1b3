// How a thread of the CUDA loss kernels reads and writes a row: a vector of kVector logits at a
// time, 16 bytes an instruction, wherever the row begins.
#pragma once

#include <cuda_bf16.h>

#include "rows.cuh"
#include "table.cuh"

namespace warp_fast {

// One row of a matrix, of which every vector begins `skip` bytes into an aligned word.
struct Line {
    char* begin;
    char* end;
    int code, skip;
};

// where row n begins; n and the run are below 2^31, for which a division costs less
__device__ inline char* row_begin(const LossMatrix& matrix, int64_t n) {
    const unsigned run = static_cast<unsigned>(n) / static_cast<unsigned>(matrix.run);
    const int64_t elements = n * matrix.stride + run * matrix.jump;
    return static_cast<char*>(matrix.address) + elements * (matrix.code == kFp32 ? 4 : 2);
}

__device__ inline Line line_of(const LossMatrix& matrix, int64_t n, int64_t width) {
    const int bytes = matrix.code == kFp32 ? 4 : 2;
    char* begin = row_begin(matrix, n);
    const int skip = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % sizeof(Word));
    return {begin, begin + width * bytes, matrix.code, skip};
}

// where vector k is; WIDE: there is an fp32 matrix
template <bool WIDE>
__device__ inline char* place_in(const Line& line, int k) {
    const int64_t bytes = kVector * (WIDE && line.code == kFp32 ? 4 : 2);
    return line.begin + k * bytes;
}

__device__ inline uint32_t pair_of(float low, float high, int code) {
    if (code == kFp16) return to_bits16(low, kFp16) | to_bits16(high, kFp16) << 16;
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16 bytes that begin `skip` bytes into an aligned word, in the largest parts that are aligned
__device__ inline void store_word(char* place, const Word& word, int skip) {
    const uint32_t* x = word.x;
    if (skip == 0) {
        *reinterpret_cast<Word*>(place) = word;
    } else if (skip % 4 == 0) {
        for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(place)[i] = x[i];
    } else {
        *reinterpret_cast<uint16_t*>(place) = static_cast<uint16_t>(x[0]);
        for (int i = 0; i < 3; ++i) {
            reinterpret_cast<uint32_t*>(place + 2)[i] = x[i] >> 16 | x[i + 1] << 16;
        }
        *reinterpret_cast<uint16_t*>(place + 14) = static_cast<uint16_t>(x[3] >> 16);
    }
}

// a vector as it lies in memory
template <bool WIDE>
struct Raw {
    Word word[WIDE ? 2 : 1];

    __device__ void load(const Line& line, int k) {
        const char* place = place_in<WIDE>(line, k) - line.skip;
        word[0] = window(place, line.skip, line.end);
        if (WIDE && line.code == kFp32 && place + line.skip + sizeof(Word) < line.end) {
            word[WIDE] = window(place + sizeof(Word), line.skip, line.end);
        }
    }
    __device__ void get(int code, float (&z)[kVector]) const {
        if (WIDE && code == kFp32) {
            for (int i = 0; i < kVector; ++i) {
                z[i] = __uint_as_float(word[WIDE && i / 4].x[i % 4]);
            }
        } else if (code == kFp16) {
            for (int i = 0; i < kVector; ++i) z[i] = from_bits16(half(i), kFp16);
        } else {
            for (int i = 0; i < kVector; ++i) z[i] = from_bits16(half(i), kBf16);
        }
    }
    __device__ void set(int code, const float (&x)[kVector]) {
        for (int i = 0; i < kVector; i += 2) {
            if (WIDE && code == kFp32) {
                word[WIDE && i / 4].x[i % 4] = __float_as_uint(x[i]);
                word[WIDE && i / 4].x[i % 4 + 1] = __float_as_uint(x[i + 1]);
            } else {
                word[0].x[i / 2] = pair_of(x[i], x[i + 1], code);
            }
        }
    }
    // count: how many elements are inside the row, at most a vector
    __device__ void store(const Line& line, int k, int count) const {
        const bool wide = WIDE && line.code == kFp32;
        char* place = place_in<WIDE>(line, k);
        if (count == kVector) {
            store_word(place, word[0], line.skip);
            if (wide) store_word(place + sizeof(Word), word[WIDE], line.skip);
            return;
        }
        for (int i = 0; i < kVector; ++i) {
            if (i < count && wide) {
                reinterpret_cast<uint32_t*>(place)[i] = word[WIDE && i / 4].x[i % 4];
            } else if (i < count) {
                reinterpret_cast<uint16_t*>(place)[i] = static_cast<uint16_t>(half(i));
            }
        }
    }
    __device__ uint32_t half(int i) const {
        return i % 2 ? word[0].x[i / 2] >> 16 : word[0].x[i / 2] & 0xFFFFu;
    }
};

}  // namespace warp_fast
