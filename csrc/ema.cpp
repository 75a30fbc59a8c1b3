// The EMA update on CPU: ema <- ema + rate * (params - ema), eight elements at a time.
//
// Bitwise equal to the reference: compiled without fused multiply-add, the same branch at one half,
// the same rounding and the same random bits.
#include "cpu.h"
#include "simd.h"

namespace warp_fast {
namespace {

template <class Float, class Weight>
WARP_FAST_INLINE Float interpolate(Float start, Float end, Weight rate) {
    const Float step = end - start;
    return rate < Weight(0.5) ? start + rate * step : end - (Weight(1) - rate) * step;
}

WARP_FAST_INLINE u32x8 random_bits16(int64_t index, const EmaCall& call) {
    const u64x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const u64x8 each = static_cast<uint64_t>(index) + lane;
    u32x8 word = (__builtin_convertvector(each, u32x8) ^ call.key_in) +
                 __builtin_convertvector(each >> 32, u32x8) * 0x9E3779B9u;
    word = (word ^ (word >> 16)) * 0x21F0AAADu;
    word = (word ^ (word >> 15)) * 0x735A2D97u;
    word ^= word >> 15;
    return (word ^ call.key_out) >> 16;
}

// bits of fp32 with every NaN made 0x7FC00000
WARP_FAST_INLINE u32x8 plain_bits(f32x8 value) {
    const u32x8 nan = bit_cast<u32x8>(value != value);
    return (bit_cast<u32x8>(value) & ~nan) | (nan & 0x7FC00000u);
}

template <int STORAGE, int PARAM>
WARP_FAST_INLINE void update(const EmaEntry& entry, int64_t at, int64_t lanes, float rate,
                             const EmaCall& call) {
    const f32x8 end = load<PARAM>(entry.params, at, lanes);
    if constexpr (STORAGE == kFull) {
        const f32x8 start = load<kFp32>(entry.ema, at, lanes);
        store<kFp32>(entry.ema, at, interpolate(start, end, rate), lanes, false);
        return;
    }
    char* high_at = place<kBf16>(entry.ema, at);
    const u32x8 high = __builtin_convertvector(load_lanes<u16x8>(high_at, lanes), u32x8);
    if constexpr (STORAGE == kSplit) {
        char* low_at = place<kInt16>(entry.residual, at);
        const u32x8 low = __builtin_convertvector(load_lanes<u16x8>(low_at, lanes), u32x8);
        // the low half is signed: its upper bit takes one from the high half
        const u32x8 joined = ((high - (low >> 15)) << 16) + low;
        const u32x8 bits = plain_bits(interpolate(bit_cast<f32x8>(joined), end, rate));
        const u32x8 rounded = (bits + 0x8000u) >> 16;
        store_lanes(high_at, __builtin_convertvector(rounded, u16x8), lanes);
        store_lanes(low_at, __builtin_convertvector(bits & 0xFFFFu, u16x8), lanes);
    } else {
        const u32x8 bits = plain_bits(interpolate(bit_cast<f32x8>(high << 16), end, rate));
        const u32x8 finite = bit_cast<u32x8>((bits & 0x7F800000u) != 0x7F800000u);
        const u32x8 random = random_bits16(entry.first_index + at, call);
        const u32x8 rounded = (bits + (random & finite)) >> 16;
        store_lanes(high_at, __builtin_convertvector(rounded, u16x8), lanes);
    }
}

template <int STORAGE, int PARAM>
void update_chunk(const EmaEntry& entry, int64_t begin, int64_t end, const EmaCall& call) {
    const float rate = static_cast<float>(call.rate);
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes) update<STORAGE, PARAM>(entry, at, kLanes, rate, call);
    if (at < end) update<STORAGE, PARAM>(entry, at, end - at, rate, call);
}

void update_fp64(const EmaEntry& entry, int64_t begin, int64_t end, double rate) {
    double* ema = static_cast<double*>(entry.ema);
    for (int64_t at = begin; at < end; ++at) {
        ema[at] = interpolate(ema[at], load_any(entry.params, at, entry.param_code), rate);
    }
}

template <int STORAGE>
void update_any(const EmaEntry& entry, int64_t begin, int64_t end, const EmaCall& call) {
    switch (entry.param_code) {
        case kBf16:
            return update_chunk<STORAGE, kBf16>(entry, begin, end, call);
        case kFp16:
            return update_chunk<STORAGE, kFp16>(entry, begin, end, call);
        default:
            return update_chunk<STORAGE, kFp32>(entry, begin, end, call);
    }
}

}  // namespace

namespace WARP_FAST_ISA {

void ema(const EmaCall& call) {
    const auto body = [&](const EmaEntry& entry, int64_t begin, int64_t end, int64_t) {
        if (entry.ema_code == kFp64) return update_fp64(entry, begin, end, call.rate);
        switch (call.storage) {
            case kSplit:
                return update_any<kSplit>(entry, begin, end, call);
            case kStochastic:
                return update_any<kStochastic>(entry, begin, end, call);
            default:
                return update_any<kFull>(entry, begin, end, call);
        }
    };
    for_each_chunk(call.entries, call.count, call.chunks, kEmaChunk, call.threads, false, body);
}

}  // namespace WARP_FAST_ISA
}  // namespace warp_fast
