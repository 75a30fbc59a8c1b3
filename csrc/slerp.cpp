// The apply pass of SLERP on CPU: out_k = init + sum_m coefficients[k, s, m] * (policy_m - init).
//
// Last chunk first: what the Gram pass read last is still in cache. Rounded where the reference
// rounds.
#include "weights.h"

namespace warp_fast {
namespace {

constexpr int kMostFused = 16;  // task vectors of one vector of lanes held at a time
// outs written while those are held; for more the inputs are read again, which holds since an out
// that is an input is the only one
constexpr int kMostRows = 8;

// rows of NaN are how a solve refuses: they write nothing
WARP_FAST_INLINE bool refused(const double* weight) { return weight[0] != weight[0]; }

WARP_FAST_INLINE const double* weights_of(const MergeEntry& entry, const MergeCall& call,
                                          int64_t k) {
    return call.coefficients + (k * call.segments + entry.segment) * call.policies;
}

// one out: its column, and the weight of each task vector
struct Row {
    int64_t column;
    float weight[kMostFused];
};

// what to write of an entry from row k on, at most kMostRows; k moves behind them
int64_t next_rows(const MergeEntry& entry, const MergeCall& call, int64_t& k, Row* rows) {
    const int policies = call.policies;
    int64_t count = 0;
    for (; k < call.rows && count < kMostRows; ++k) {
        const double* weight = weights_of(entry, call, k);
        if (refused(weight)) continue;
        Row& row = rows[count++];
        row.column = 1 + policies + k;
        for (int m = 0; m < policies; ++m) row.weight[m] = static_cast<float>(weight[m]);
    }
    return count;
}

// M: the number of policies, or 0 for any up to kMostFused.
template <int CODE, int M>
WARP_FAST_INLINE void merge(const MergeEntry& entry, int64_t at, int64_t lanes, int any,
                            const Row* rows, int64_t count) {
    const int policies = M > 0 ? M : any;
    const Lanes start = load_column<CODE>(entry, 0, at, lanes);
    Lanes delta[M > 0 ? M : kMostFused];
    for (int m = 0; m < policies; ++m) {
        const Lanes stop = load_column<CODE>(entry, 1 + m, at, lanes);
        delta[m] = {stop.a - start.a, stop.b - start.b};
    }
    for (const Row* row = rows; row < rows + count; ++row) {
        Lanes sum = start;
        for (int m = 0; m < policies; ++m) {
            sum.a += row->weight[m] * delta[m].a;
            sum.b += row->weight[m] * delta[m].b;
        }
        store_column<CODE>(entry, row->column, at, sum, lanes);
    }
}

template <int CODE, int M>
void merge_chunk(const MergeEntry& entry, int64_t begin, int64_t end, const MergeCall& call) {
    Row rows[kMostRows];
    for (int64_t k = 0; k < call.rows;) {
        const int64_t count = next_rows(entry, call, k, rows);
        if (count == 0) return;
        int64_t at = begin;
        for (; at + kLanes <= end; at += kLanes) {
            merge<CODE, M>(entry, at, kLanes, call.policies, rows, count);
        }
        if (at < end) merge<CODE, M>(entry, at, end - at, call.policies, rows, count);
    }
}

template <int CODE>
void merge_any(const MergeEntry& entry, int64_t begin, int64_t end, const MergeCall& call) {
    switch (call.policies) {
        case 1:
            return merge_chunk<CODE, 1>(entry, begin, end, call);
        case 2:
            return merge_chunk<CODE, 2>(entry, begin, end, call);
        case 3:
            return merge_chunk<CODE, 3>(entry, begin, end, call);
        case 5:
            return merge_chunk<CODE, 5>(entry, begin, end, call);
        default:
            return merge_chunk<CODE, 0>(entry, begin, end, call);
    }
}

// one element at a time, in fp64 from the first fp64 task vector on, for any number of policies
void merge_wide(const MergeEntry& entry, int64_t begin, int64_t end, const MergeCall& call) {
    const int policies = call.policies;
    for (int64_t at = begin; at < end; ++at) {
        const double start = load_any(entry.address[0], at, entry.code[0]);
        for (int64_t k = 0; k < call.rows; ++k) {
            const double* weight = weights_of(entry, call, k);
            if (refused(weight)) continue;
            bool wide = entry.code[0] == kFp64;
            double sum = start;
            for (int m = 0; m < policies; ++m) {
                const int code = entry.code[1 + m];
                const double value = load_any(entry.address[1 + m], at, code);
                if (entry.code[0] == kFp64 || code == kFp64) {
                    wide = true;
                    sum += weight[m] * (value - start);
                    continue;
                }
                const float delta = static_cast<float>(value) - static_cast<float>(start);
                const float product = static_cast<float>(weight[m]) * delta;
                sum = wide ? sum + product : static_cast<double>(static_cast<float>(sum) + product);
            }
            const int64_t out = 1 + policies + k;
            store_any(entry.address[out], at, entry.code[out], sum);
        }
    }
}

}  // namespace

namespace WARP_FAST_ISA {

void apply(const MergeCall& call) {
    const auto body = [&](const MergeEntry& entry, int64_t begin, int64_t end, int64_t) {
        const int code = common_code(entry, 1 + call.policies + call.rows);
        if (code == kWide || call.policies > kMostFused) return merge_wide(entry, begin, end, call);
        switch (code) {
            case kBf16:
                return merge_any<kBf16>(entry, begin, end, call);
            case kFp32:
                return merge_any<kFp32>(entry, begin, end, call);
            default:
                return merge_any<kMixed>(entry, begin, end, call);
        }
    };
    for_each_chunk(call.entries, call.count, call.chunks, kMergeChunk, call.threads, true, body);
}

}  // namespace WARP_FAST_ISA
}  // namespace warp_fast
