// How the passes over policies and their common init read and write weights of mixed dtypes.
#pragma once

#include "cpu.h"
#include "simd.h"

namespace warp_fast {
namespace {

constexpr int kMixed = -1;  // 2- and 4-byte dtypes together
constexpr int kWide = -2;   // fp64 among them: one element at a time

inline int common_code(const MergeEntry& entry, int64_t columns) {
    int common = entry.code[0];
    for (int64_t c = 0; c < columns; ++c) {
        if (entry.code[c] == kFp64) return kWide;
        if (entry.code[c] != common) common = kMixed;
    }
    return common;
}

// CODE: the dtype of all columns, or kMixed. Where all are bf16, a and b are even and odd elements.
template <int CODE>
WARP_FAST_INLINE Lanes load_column(const MergeEntry& entry, int64_t c, int64_t at, int64_t lanes) {
    const void* base = entry.address[c];
    prefetch_ahead(base, at * (CODE == kMixed ? bytes_of(entry.code[c]) : kBytes<CODE>));
    if constexpr (CODE == kBf16) return as_float(load_even_odd(base, at, lanes));
    if constexpr (CODE == kFp32) return load<kFp32>(base, at, lanes);
    switch (entry.code[c]) {
        case kFp32:
            return load<kFp32>(base, at, lanes);
        case kFp16:
            return load<kFp16>(base, at, lanes);
        default:
            return load<kBf16>(base, at, lanes);
    }
}

template <int CODE>
WARP_FAST_INLINE void store_column(const MergeEntry& entry, int64_t c, int64_t at,
                                   const Lanes& value, int64_t lanes) {
    void* base = entry.address[c];
    if constexpr (CODE == kBf16) {
        const Bits rounded = {rounded_to_bf16(value.a), rounded_to_bf16(value.b)};
        return store_even_odd(base, at, rounded, lanes, entry.stream);
    }
    if constexpr (CODE == kFp32) return store<kFp32>(base, at, value, lanes, entry.stream);
    switch (entry.code[c]) {
        case kFp32:
            return store<kFp32>(base, at, value, lanes, entry.stream);
        case kFp16:
            return store<kFp16>(base, at, value, lanes, entry.stream);
        default:
            return store<kBf16>(base, at, value, lanes, entry.stream);
    }
}

}  // namespace
}  // namespace warp_fast
