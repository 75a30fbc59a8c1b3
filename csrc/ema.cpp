// The EMA update on CPU: ema <- ema + rate * (params - ema), sixteen elements at a time.
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
    if (rate < Weight(0.5)) return start + rate * step;
    // at rate 1 even where the step is infinite
    return rate < Weight(1) ? end - (Weight(1) - rate) * step : end;
}

// 16 uniform bits for the elements first + lane
WARP_FAST_INLINE u32x8 random_bits16(uint64_t first, u32x8 lane, const EmaCall& call) {
    const u32x8 low = static_cast<uint32_t>(first) + lane;
    const u32x8 carried = bit_cast<u32x8>(low < lane);  // all ones or 0
    const uint32_t high = static_cast<uint32_t>(first >> 32) * 0x9E3779B9u;
    u32x8 word = (low ^ call.key_in) + (high + (carried & 0x9E3779B9u));
    word = (word ^ (word >> 16)) * 0x21F0AAADu;
    word = (word ^ (word >> 15)) * 0x735A2D97u;
    word ^= word >> 15;
    return (word ^ call.key_out) >> 16;
}

// bits of the moved average with every NaN made 0x7FC00000
WARP_FAST_INLINE u32x8 moved_bits(u32x8 start, f32x8 end, float rate) {
    const f32x8 moved = interpolate(bit_cast<f32x8>(start), end, rate);
    return moved == moved ? bit_cast<u32x8>(moved) : u32x8{} + 0x7FC00000u;
}

WARP_FAST_INLINE u32x8 sign_extended(u32x8 upper_half) {
    return bit_cast<u32x8>(bit_cast<i32x8>(upper_half) >> 16);
}

WARP_FAST_INLINE u32x8 round_stochastic(u32x8 bits, uint64_t first, u32x8 lane,
                                        const EmaCall& call) {
    const u32x8 finite = bit_cast<u32x8>((bits & 0x7F800000u) != 0x7F800000u);
    return bits + (random_bits16(first, lane, call) & finite);
}

// even and odd elements, as averages of 16 bits are loaded
template <int PARAM>
WARP_FAST_INLINE Lanes load_params(const void* base, int64_t at, int64_t lanes) {
    if constexpr (PARAM == kBf16) return as_float(load_even_odd(base, at, lanes));
    return even_odd(load<PARAM>(base, at, lanes));
}

template <int STORAGE, int PARAM>
WARP_FAST_INLINE void update(const EmaEntry& entry, int64_t at, int64_t lanes, float rate,
                             const EmaCall& call) {
    prefetch_ahead(entry.ema, at * (STORAGE == kFull ? kBytes<kFp32> : kBytes<kBf16>));
    prefetch_ahead(entry.params, at * kBytes<PARAM>);
    if constexpr (STORAGE == kSplit) prefetch_ahead(entry.residual, at * kBytes<kInt16>);
    if constexpr (STORAGE == kFull) {
        const Lanes start = load<kFp32>(entry.ema, at, lanes);
        const Lanes end = load<PARAM>(entry.params, at, lanes);
        const Lanes moved = {interpolate(start.a, end.a, rate), interpolate(start.b, end.b, rate)};
        return store<kFp32>(entry.ema, at, moved, lanes, false);
    }
    const Bits high = load_even_odd(entry.ema, at, lanes);
    const Lanes end = load_params<PARAM>(entry.params, at, lanes);
    if constexpr (STORAGE == kSplit) {
        char* const residual = place<kInt16>(entry.residual, at);
        const u32x8 low = load_bytes<u32x8>(residual, lanes * kBytes<kInt16>);
        const Bits moved = {moved_bits(high.a + sign_extended(low << 16), end.a, rate),
                            moved_bits(high.b + sign_extended(low), end.b, rate)};
        store_even_odd(entry.ema, at, {moved.a + 0x8000u, moved.b + 0x8000u}, lanes, false);
        const u32x8 rest = halves(moved.a, moved.b << 16);
        store_bytes(residual, rest, lanes * kBytes<kInt16>, false);
    } else {
        const uint64_t first = static_cast<uint64_t>(entry.first_index + at);
        const u32x8 even = {0, 2, 4, 6, 8, 10, 12, 14};
        const Bits rounded = {
            round_stochastic(moved_bits(high.a, end.a, rate), first, even, call),
            round_stochastic(moved_bits(high.b, end.b, rate), first, even + 1, call)};
        store_even_odd(entry.ema, at, rounded, lanes, false);
    }
}

template <int STORAGE, int PARAM>
void update_chunk(const EmaEntry& shared_entry, int64_t begin, int64_t end,
                  const EmaCall& shared_call) {
    // for all C++ knows, a store could change the shared ones
    const EmaEntry entry = shared_entry;
    const EmaCall call = shared_call;
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
