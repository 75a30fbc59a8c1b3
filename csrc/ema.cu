// The EMA update in CUDA: ema <- ema + rate * (params - ema), one launch for a list of tensors.
//
// Bitwise equal to the reference: no fused multiply-add, the same branch at one half, the same
// rounding and the same random bits.
#include "cuda.h"
#include "table.cuh"

namespace warp_fast {
namespace {

constexpr int kThreads = 256;

struct Rate {
    double number;
    const void* pointer;  // one number on the device, or null
    int code;
};

struct Keys {
    uint32_t in, out;
};

__device__ double read(const Rate& rate) {
    return rate.pointer == nullptr ? rate.number : load_any(rate.pointer, 0, rate.code);
}

__device__ float interpolate(float start, float end, float rate) {
    const float step = __fsub_rn(end, start);
    if (rate < 0.5f) return __fadd_rn(start, __fmul_rn(rate, step));
    // at rate 1 even where the step is infinite
    return rate < 1.0f ? __fsub_rn(end, __fmul_rn(__fsub_rn(1.0f, rate), step)) : end;
}

__device__ double interpolate(double start, double end, double rate) {
    const double step = __dsub_rn(end, start);
    if (rate < 0.5) return __dadd_rn(start, __dmul_rn(rate, step));
    return rate < 1.0 ? __dsub_rn(end, __dmul_rn(__dsub_rn(1.0, rate), step)) : end;
}

__device__ uint32_t random_bits16(uint64_t index, Keys keys) {
    uint32_t word = (static_cast<uint32_t>(index) ^ keys.in) +
                    static_cast<uint32_t>(index >> 32) * 0x9E3779B9u;
    word = (word ^ (word >> 16)) * 0x21F0AAADu;
    word = (word ^ (word >> 15)) * 0x735A2D97u;
    word ^= word >> 15;
    return (word ^ keys.out) >> 16;
}

// bf16 bits of value, rounded up or down by 16 random bits
__device__ uint32_t round_stochastic(float value, uint64_t index, Keys keys) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7FC0u;
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    return (finite ? bits + random_bits16(index, keys) : bits) >> 16;
}

__device__ float join(uint32_t high, uint32_t low) {
    return __uint_as_float((high << 16) + static_cast<uint32_t>(static_cast<int16_t>(low)));
}

// fp32 bits to be split; arithmetic makes the NaN 0x7FFFFFFF, whose rounded high half is -0.0
__device__ uint32_t split_bits(float value) {
    return value != value ? 0x7FC00000u : __float_as_uint(value);
}

__device__ uint32_t half_of(uint32_t word, int odd) { return odd ? word >> 16 : word & 0xFFFFu; }

// VEC elements, as the words they are loaded in
template <int CODE, int VEC>
struct Vector {
    static constexpr int kWords = VEC * (CODE == kFp32 ? 4 : 2) / 4;
    uint32_t word[kWords];

    __device__ void load(const void* base, int64_t at) {
        const char* from = static_cast<const char*>(base) + at * (CODE == kFp32 ? 4 : 2);
        if constexpr (kWords == 4) {
            const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
            word[0] = raw.x, word[1] = raw.y, word[2] = raw.z, word[3] = raw.w;
        } else {
            const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(from));
            word[0] = raw.x, word[1] = raw.y;
        }
    }
    __device__ void store(void* base, int64_t at) const {
        char* to = static_cast<char*>(base) + at * (CODE == kFp32 ? 4 : 2);
        if constexpr (kWords == 4) {
            __stcs(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
        } else {
            __stcs(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
        }
    }
    __device__ uint32_t bits16(int i) const { return half_of(word[i / 2], i % 2); }
    __device__ float value(int i) const {
        return CODE == kFp32 ? __uint_as_float(word[i]) : from_bits16(bits16(i), CODE);
    }
    __device__ void set16(int i, uint32_t bits) {
        word[i / 2] = i % 2 ? (word[i / 2] & 0xFFFFu) | bits << 16
                            : (word[i / 2] & 0xFFFF0000u) | (bits & 0xFFFFu);
    }
};

template <int STORAGE, int PARAM>
__global__ void __launch_bounds__(kThreads)
    ema_aligned(const int64_t* table, const int32_t* block_entry, int64_t blocks, Rate rate,
                Keys keys) {
    // the widest dtype takes 16 bytes per thread: neighbours stay neighbours in every tensor
    constexpr int kVec = STORAGE == kFull || PARAM == kFp32 ? 4 : 8;
    constexpr int kSteps = kEmaBlock / (kThreads * kVec);
    using Average = Vector<STORAGE == kFull ? kFp32 : kBf16, kVec>;
    const float weight = static_cast<float>(read(rate));
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const Entry entry =
            entry_at(table, block_entry[block], kHead + (STORAGE == kSplit ? 3 : 2));
        const int64_t begin = (block - entry.first) * kEmaBlock + threadIdx.x * kVec;
        void* ema = column<void>(entry, 0);
        const void* params = column<void>(entry, 1);
        void* residual = STORAGE == kSplit ? column<void>(entry, 2) : nullptr;
        Average average[kSteps];
        Vector<PARAM, kVec> param[kSteps];
        Vector<kInt16, kVec> low[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const int64_t at = begin + s * kThreads * kVec;
            if (at >= entry.size) break;
            average[s].load(ema, at);
            param[s].load(params, at);
            if constexpr (STORAGE == kSplit) low[s].load(residual, at);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const int64_t at = begin + s * kThreads * kVec;
            if (at >= entry.size) break;
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                float start = average[s].value(i);
                if constexpr (STORAGE == kSplit) {
                    start = join(average[s].bits16(i), low[s].bits16(i));
                }
                const float moved = interpolate(start, param[s].value(i), weight);
                if constexpr (STORAGE == kSplit) {
                    const uint32_t bits = split_bits(moved);
                    average[s].set16(i, (bits + 0x8000u) >> 16);
                    low[s].set16(i, bits);
                } else if constexpr (STORAGE == kStochastic) {
                    average[s].set16(i, round_stochastic(moved, entry.payload + at + i, keys));
                } else {
                    average[s].word[i] = __float_as_uint(moved);
                }
            }
            average[s].store(ema, at);
            if constexpr (STORAGE == kSplit) low[s].store(residual, at);
        }
    }
}

// any alignment, any param dtype, fp64 averages: one element at a time
template <int STORAGE>
__global__ void __launch_bounds__(kThreads)
    ema_any(const int64_t* table, const int32_t* block_entry, int64_t blocks, Rate rate, Keys keys,
            int ema_code, int param_code) {
    const double weight = read(rate);
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const Entry entry =
            entry_at(table, block_entry[block], kHead + (STORAGE == kSplit ? 3 : 2));
        const int64_t begin = (block - entry.first) * kEmaBlock;
        const int64_t left = entry.size - begin;
        void* ema = column<void>(entry, 0);
        const void* params = column<void>(entry, 1);
        for (int i = threadIdx.x; i < kEmaBlock && i < left; i += kThreads) {
            const int64_t at = begin + i;
            const double end = load_any(params, at, param_code);
            if (STORAGE == kFull && ema_code == kFp64) {
                store_any(ema, at, kFp64, interpolate(load_any(ema, at, kFp64), end, weight));
                continue;
            }
            const float f_end = static_cast<float>(end), f_weight = static_cast<float>(weight);
            if constexpr (STORAGE == kFull) {
                const float start = static_cast<float>(load_any(ema, at, kFp32));
                store_any(ema, at, kFp32, interpolate(start, f_end, f_weight));
            } else {
                uint16_t* high = static_cast<uint16_t*>(ema) + at;
                if constexpr (STORAGE == kSplit) {
                    uint16_t* low = column<uint16_t>(entry, 2) + at;
                    const uint32_t bits =
                        split_bits(interpolate(join(*high, *low), f_end, f_weight));
                    *high = static_cast<uint16_t>((bits + 0x8000u) >> 16);
                    *low = static_cast<uint16_t>(bits);
                } else {
                    const float moved = interpolate(from_bits16(*high, kBf16), f_end, f_weight);
                    *high = static_cast<uint16_t>(
                        round_stochastic(moved, entry.payload + at, keys));
                }
            }
        }
    }
}

}  // namespace

void ema_update_cuda(const int64_t* table, const int32_t* block_entry, int64_t blocks, int storage,
                     int ema_code, int param_code, bool aligned, double rate,
                     const void* device_rate, int rate_code, uint32_t key_in, uint32_t key_out,
                     void* stream) {
    if (blocks == 0) return;
    const Rate weight{rate, device_rate, rate_code};
    const Keys keys{key_in, key_out};
    cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const auto wide = [&](auto kernel) {
        const unsigned grid = grid_size(kernel, kThreads, blocks);
        kernel<<<grid, kThreads, 0, queue>>>(table, block_entry, blocks, weight, keys);
    };
    const auto any = [&](auto kernel) {
        const unsigned grid = grid_size(kernel, kThreads, blocks);
        kernel<<<grid, kThreads, 0, queue>>>(table, block_entry, blocks, weight, keys, ema_code,
                                             param_code);
    };
    const bool vectors = aligned && ema_code != kFp64 && param_code != kFp64;
    as_constant<kFull, kSplit, kStochastic>(storage, [&](auto storage) {
        constexpr int kStorage = decltype(storage)::value;
        if (!vectors) return any(ema_any<kStorage>);
        as_constant<kBf16, kFp16, kFp32>(param_code, [&](auto code) {
            wide(ema_aligned<kStorage, decltype(code)::value>);
        });
    });
    check(cudaGetLastError(), "launching the EMA update");
}

}  // namespace warp_fast
