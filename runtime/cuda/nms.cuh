// From raw heads to detections: what runtime/heads.py and nms.py compute, equal to the bit but for the last place of
// the exponential.
//
// Nothing depends on the order in which threads arrive: keys are unique, and whatever atomics hand out is sorted
// afterwards. No block waits for another. Launch shapes, order and workspace: plan.h.
#pragma once
#include <cuda_fp16.h>

#include "parameters.h"

namespace parkdet {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- numbers ----

__device__ inline float power_of_two(int exponent) {  // from -126 to 127
    return __int_as_float((exponent + 127) << 23);
}

// e^x within one unit in the last place, of operations that IEEE 754 fixes, so that every GPU and the simulation
// on the CPU give the same bits. Below -40 it is e^-40, which 1 + e^x does not see.
__device__ inline float exponential(float x) {
    x = fminf(fmaxf(x, -40.f), 89.f);
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log(2) in two parts, the first exact in 10 bits
    // (e^r - 1 - r) / r^2 for |r| <= log(2) / 2, fitted at Chebyshev nodes.
    float q = 1.98993919e-4f;
    q = q * r + 1.39337336e-3f;
    q = q * r + 8.33329838e-3f;
    q = q * r + 4.1666463e-2f;
    q = q * r + 1.66666672e-1f;
    q = q * r + 0.5f;
    const float mantissa = 1.f + (r + r * r * q);
    // In two steps: 2^128 is no float, but e^88.5 is one.
    const int exponent = static_cast<int>(n);
    const int half = exponent / 2;
    return mantissa * power_of_two(half) * power_of_two(exponent - half);
}

__device__ inline float sigmoid(float raw) { return 1.f / (1.f + exponential(-raw)); }

// ---- heads ----

__device__ inline int head_of(const NmsParameters& p, int anchor) {
    int head = 0;
    while (head + 1 < p.num_heads && anchor >= p.heads[head + 1].first_anchor) ++head;
    return head;
}

// Where the channels of one anchor of one image begin in its head.
__device__ inline size_t channels_at(const NmsParameters& p, const Head& head, int image, int anchor) {
    const size_t anchors = static_cast<size_t>(head.anchors) * head.rows * head.columns;
    return (image * anchors + (anchor - head.first_anchor)) * (5 + p.num_classes);
}

__device__ inline float load(const NmsParameters& p, const Head& head, size_t at) {
    if (p.half_heads) return __half2float(static_cast<const __half*>(head.raw)[at]);
    return static_cast<const float*>(head.raw)[at];
}

// The objectness of an anchor, or 0 where it does not pass: not over conf, or a box that is no number. Infinite
// logits are numbers: their sigmoid is 0 or 1. At or under logit_floor no sigmoid is taken.
__device__ inline float passing_objectness(const NmsParameters& p, int image, int anchor, float logit_floor) {
    if (anchor >= p.num_anchors) return 0;
    const Head& head = p.heads[head_of(p, anchor)];
    const size_t at = channels_at(p, head, image, anchor);
    const float raw = load(p, head, at + 4);
    if (!(raw > logit_floor)) return 0;
    const float objectness = sigmoid(raw);
    if (!(objectness > p.conf)) return 0;
    for (int channel = 0; channel < 4; ++channel) {
        const float box = load(p, head, at + channel);
        if (box != box) return 0;
    }
    return objectness;
}

// Scores are positive, so their bits order as they do.
__device__ inline Key make_key(float score, unsigned index) {
    return static_cast<Key>(static_cast<unsigned>(__float_as_int(score))) << 32 | (0xffffffffu - index);
}

__device__ inline float score_of(Key key) { return __int_as_float(static_cast<int>(key >> 32)); }

__device__ inline unsigned index_of(Key key) { return 0xffffffffu - static_cast<unsigned>(key & 0xffffffffu); }

// A logit at or under which no sigmoid reaches the score of the key, whatever its last places: a hundredth too low.
__device__ inline float logit_floor_of(Key key) {
    const float score = fminf(score_of(key), 0.999f);
    return logf(score / (1.f - score)) - 0.01f;
}

// Calls emit(key) in all lanes of a warp together, key 0 in lanes without a candidate, until every candidate of the
// block's anchors was given once; those under `lowest` may be left out, which saves their sigmoids. An anchor that
// passes has its classes looked at by the whole warp: few do, and their channels lie side by side.
template <class Emit>
__device__ inline void for_each_candidate(const NmsParameters& p, int image, Key lowest, Emit emit) {
    const float logit_floor = fmaxf(p.logit_floor, logit_floor_of(lowest));
    const int lane = threadIdx.x % kWarp;
    for (int step = 0; step < kAnchorsPerThread; ++step) {
        const int anchor = (blockIdx.x * kAnchorsPerThread + step) * blockDim.x + threadIdx.x;
        const float own_objectness = passing_objectness(p, image, anchor, logit_floor);
        for (unsigned left = __ballot_sync(kAllLanes, own_objectness > 0); left != 0; left &= left - 1) {
            const int source = __ffs(left) - 1;
            const float objectness = __shfl_sync(kAllLanes, own_objectness, source);
            const int common = anchor - lane + source;
            const Head& head = p.heads[head_of(p, common)];
            const size_t at = channels_at(p, head, image, common) + 5;
            Key best = 0;
            for (int first = 0; first < p.num_classes; first += kWarp) {
                const int label = first + lane;
                Key key = 0;
                const float raw = label < p.num_classes ? load(p, head, at + label) : logit_floor;
                if (raw > logit_floor) {  // a product with an objectness is not larger than the factor
                    const float score = sigmoid(raw) * objectness;
                    if (score > p.conf) key = make_key(score, static_cast<unsigned>(common) * p.num_classes + label);
                }
                if (p.multi_label) emit(key);
                else if (key > best) best = key;
            }
            if (!p.multi_label) {
                for (int distance = kWarp / 2; distance > 0; distance /= 2) {
                    const Key other = __shfl_xor_sync(kAllLanes, best, distance);
                    if (other > best) best = other;
                }
                emit(lane == 0 ? best : 0);
            }
        }
    }
}

// Corners in canvas pixels of the anchor of a candidate.
__device__ inline Box decode_box(const NmsParameters& p, int image, int anchor) {
    const Head& head = p.heads[head_of(p, anchor)];
    const size_t at = channels_at(p, head, image, anchor);
    const int local = anchor - head.first_anchor;
    const int column = local % head.columns;
    const int row = local / head.columns % head.rows;
    const int shape = local / head.columns / head.rows;
    const float width_root = sigmoid(load(p, head, at + 2)) * 2.f;
    const float height_root = sigmoid(load(p, head, at + 3)) * 2.f;
    float x = (sigmoid(load(p, head, at)) * 2.f - 0.5f + column) * head.stride / head.view_scale;
    const float y = (sigmoid(load(p, head, at + 1)) * 2.f - 0.5f + row) * head.stride / head.view_scale;
    const float half_width = width_root * width_root * head.anchor_wh[shape][0] / head.view_scale / 2.f;
    const float half_height = height_root * height_root * head.anchor_wh[shape][1] / head.view_scale / 2.f;
    if (head.view_flip) x = p.canvas_width - x;
    return Box{x - half_width, y - half_height, x + half_width, y + half_height};
}

// ---- the best max_candidates: radix select from the highest digit, on keys made anew from the heads ----

// Which keys are in, once `digits` digits are counted. The whole block calls it; it has barriers.
__device__ inline Pick narrowed(const ImageState& state, int digits, int max_candidates) {
    __shared__ int counts[kBins];
    __shared__ Pick chosen;
    if (digits == 0) return Pick{0, max_candidates, 0};
    const int bin = threadIdx.x;
    const Pick before = state.picks[digits - 1];
    counts[bin] = state.histograms[digits - 1][bin];
    __syncthreads();
    int larger = 0;
    for (int other = kBins - 1; other > bin; --other) larger += counts[other];
    if (larger < before.needed && before.needed <= larger + counts[bin])
        chosen = Pick{before.prefix << kDigitBits | static_cast<unsigned>(bin), before.needed - larger, 0};
    __syncthreads();
    return chosen;
}

__device__ inline int count_of(const NmsParameters& p, int image) {
    const int found = p.states[image].found[0];
    return found < p.max_candidates ? found : p.max_candidates;
}

// ---- greedy suppression ----

// Whether a kept box lets the other go.
__device__ inline bool suppresses(const NmsParameters& p, const Box& a, int a_class, const Box& b, int b_class) {
    if (!p.agnostic && a_class != b_class) return false;
    const float width = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1);
    const float height = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
    const float intersection = fmaxf(width, 0.f) * fmaxf(height, 0.f);
    const float a_area = (a.x2 - a.x1) * (a.y2 - a.y1);
    const float b_area = (b.x2 - b.x1) * (b.y2 - b.y1);
    return intersection / (b_area + a_area - intersection) > p.iou;  // 0 / 0 is not
}

}  // namespace parkdet

extern "C" {

__global__ void __launch_bounds__(parkdet::kBins) parkdet_reset(parkdet::NmsParameters p) {
    parkdet::ImageState& state = p.states[blockIdx.x];
    for (int digit = 0; digit < parkdet::kDigits; ++digit) state.histograms[digit][threadIdx.x] = 0;
    if (threadIdx.x < 2) state.found[threadIdx.x] = 0;
}

// Round 0 counts every candidate and stores what fits; round 1, where that was not all, stores the best.
__global__ void __launch_bounds__(parkdet::kCollectThreads) parkdet_collect(parkdet::NmsParameters p) {
    using namespace parkdet;
    const int image = blockIdx.y;
    ImageState& state = p.states[image];
    Key lowest = 1;
    if (p.round == 1) {
        if (state.found[0] <= p.max_candidates) return;
        lowest = narrowed(state, kDigits, p.max_candidates).prefix;
    }
    Key* keys = p.keys + static_cast<size_t>(image) * p.max_candidates;
    const int lane = threadIdx.x % kWarp;
    for_each_candidate(p, image, lowest, [&](Key key) {
        const unsigned storing = __ballot_sync(kAllLanes, key >= lowest);
        int base = 0;
        if (lane == 0 && storing) base = atomicAdd(&state.found[p.round], __popc(storing));
        base = __shfl_sync(kAllLanes, base, 0);
        const int slot = base + __popc(storing & ((1u << lane) - 1));
        if (key >= lowest && slot < p.max_candidates) keys[slot] = key;
    });
}

__global__ void __launch_bounds__(parkdet::kCollectThreads) parkdet_select(parkdet::NmsParameters p) {
    using namespace parkdet;
    __shared__ int histogram[kBins];
    const int image = blockIdx.y;
    ImageState& state = p.states[image];
    if (state.found[0] <= p.max_candidates) return;
    const Pick pick = narrowed(state, p.round, p.max_candidates);
    if (blockIdx.x == 0 && threadIdx.x == 0) state.picks[p.round] = pick;
    histogram[threadIdx.x] = 0;
    __syncthreads();
    const int shift = kDigitBits * (kDigits - 1 - p.round);
    const Key lowest = pick.prefix << kDigitBits << shift;
    for_each_candidate(p, image, lowest, [&](Key key) {
        const Key digits = key >> shift;
        if (key != 0 && digits >> kDigitBits == pick.prefix) atomicAdd(&histogram[digits % kBins], 1);
    });
    __syncthreads();
    if (histogram[threadIdx.x]) atomicAdd(&state.histograms[p.round][threadIdx.x], histogram[threadIdx.x]);
}

// Bitonic sort of one tile, descending.
__global__ void __launch_bounds__(parkdet::kSortThreads) parkdet_sort(parkdet::NmsParameters p) {
    using namespace parkdet;
    __shared__ Key tile[kSortTile];
    const int image = blockIdx.y;
    const int begin = blockIdx.x * kSortTile;
    const int rest = count_of(p, image) - begin;
    if (rest <= 0) return;
    const int count = rest < kSortTile ? rest : kSortTile;
    Key* keys = p.keys + static_cast<size_t>(image) * p.max_candidates + begin;
    int size = 1;
    while (size < count) size *= 2;
    for (int i = threadIdx.x; i < size; i += blockDim.x) tile[i] = i < count ? keys[i] : 0;
    for (int run = 2; run <= size; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
                const int low = 2 * pair - (pair & (distance - 1));
                const int high = low + distance;
                const bool descends = (low & run) == 0;
                const Key a = tile[low], b = tile[high];
                if ((a < b) == descends) {
                    tile[low] = b;
                    tile[high] = a;
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) keys[i] = tile[i];
}

// The place of a key among all is its place in its tile and the keys larger than it in the others. There go the key
// and its decoded box.
__global__ void __launch_bounds__(parkdet::kSortThreads) parkdet_rank(parkdet::NmsParameters p) {
    using namespace parkdet;
    constexpr int kOwn = kSortTile / kSortThreads;
    __shared__ Key tile[kSortTile];
    const int image = blockIdx.y;
    const int begin = blockIdx.x * kSortTile;
    const int count = count_of(p, image);
    if (begin >= count) return;
    const size_t first = static_cast<size_t>(image) * p.max_candidates;
    const Key* keys = p.keys + first;
    Key own[kOwn];
    int rank[kOwn];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
        rank[e] = e * kSortThreads + static_cast<int>(threadIdx.x);
        own[e] = begin + rank[e] < count ? keys[begin + rank[e]] : 0;
    }
    for (int other = 0; other < count; other += kSortTile) {
        if (other == begin) continue;
        const int length = count - other < kSortTile ? count - other : kSortTile;
        for (int i = threadIdx.x; i < length; i += blockDim.x) tile[i] = keys[other + i];
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            int low = 0, high = length;  // keys before low are larger, from high on they are not
            while (low < high) {
                const int middle = (low + high) / 2;
                if (tile[middle] > own[e]) low = middle + 1;
                else high = middle;
            }
            rank[e] += low;
        }
        __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
        if (own[e] == 0) continue;
        p.ranked_keys[first + rank[e]] = own[e];
        p.ranked_boxes[first + rank[e]] = decode_box(p, image, static_cast<int>(index_of(own[e]) / p.num_classes));
    }
}

// Greedy, one block an image. The candidates are taken a block's width at a time, best first: first each is held
// against the boxes kept so far, then the block keeps its first one left, again and again, and holds the rest
// against it. So there are as many rounds as boxes kept, whatever the number of candidates.
__global__ void __launch_bounds__(parkdet::kSuppressThreads) parkdet_suppress(parkdet::NmsParameters p) {
    using namespace parkdet;
    __shared__ unsigned left[kWarp];  // of each warp, the lanes whose candidate is neither kept nor suppressed
    __shared__ Box kept_box;
    __shared__ int kept_class;
    const int image = blockIdx.x;
    const int thread = threadIdx.x;
    const int lane = thread % kWarp;
    const int count = count_of(p, image);
    const size_t first = static_cast<size_t>(image) * p.max_candidates;
    const size_t out = static_cast<size_t>(image) * p.max_det;
    int kept = 0;
    bool stopped = false;
    for (int begin = 0; begin < count && !stopped; begin += kSuppressThreads) {
        bool alive = begin + thread < count;
        const size_t at = first + (alive ? begin + thread : 0);
        const Key key = p.ranked_keys[at];
        const Box box = p.ranked_boxes[at];
        const int label = static_cast<int>(index_of(key) % p.num_classes);
        for (int k = 0; k < kept && alive; ++k)
            alive = !suppresses(p, p.boxes[out + k], p.classes[out + k], box, label);
        for (;;) {
            const unsigned lanes = __ballot_sync(kAllLanes, alive);
            if (lane == 0) left[thread / kWarp] = lanes;
            __syncthreads();
            const unsigned warps = __ballot_sync(kAllLanes, left[lane] != 0);
            if (warps == 0) break;
            if (kept == p.max_det) {
                stopped = true;
                break;
            }
            const int warp = __ffs(warps) - 1;
            if (thread == warp * kWarp + __ffs(left[warp]) - 1) {
                kept_box = p.boxes[out + kept] = box;
                kept_class = p.classes[out + kept] = label;
                p.scores[out + kept] = score_of(key);
                alive = false;
            }
            ++kept;
            __syncthreads();
            alive = alive && !suppresses(p, kept_box, kept_class, box, label);
        }
        __syncthreads();  // nobody may write `left` for the next candidates while others read it
    }
    for (int k = kept + thread; k < p.max_det; k += kSuppressThreads) {
        p.boxes[out + k] = Box{0, 0, 0, 0};
        p.scores[out + k] = 0;
        p.classes[out + k] = -1;
    }
    if (thread == 0) {
        p.num_dets[image] = kept;
        p.candidates[image] = p.states[image].found[0];
        p.at_max_det[image] = stopped;
    }
}

}  // extern "C"
