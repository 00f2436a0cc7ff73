// Host side of the kernels, C++: parameters from what a caller knows, workspace, launches. Used by the TensorRT
// plugin and by the simulation; `kernels.py` does the same for Python, and a test holds the two together.
#pragma once
#include <cmath>
#include <cstddef>
#include <limits>

#include "parameters.h"

namespace parkdet {

struct Launch {
    const char* entry;
    unsigned grid_x;
    unsigned grid_y;
    unsigned threads;
    int round;
};

// Logit at or under which sigmoid(logit) > conf cannot be, whatever the last places of the sigmoid.
inline float logit_floor(float conf) {
    if (!(conf > 0)) return -std::numeric_limits<float>::infinity();
    if (conf >= 1) return std::numeric_limits<float>::infinity();
    const double c = conf;
    return static_cast<float>(std::log(c / (1 - c)) - 1e-3 - 1e-6 / (1 - c));
}

// Appends a head; false when it does not fit (too many heads or anchors a cell). Heads come in decoded order.
inline bool add_head(NmsParameters& p, int anchors, int rows, int columns, float stride, float view_scale,
                     bool view_flip, const float* anchor_wh) {
    if (p.num_heads == kMaxHeads || anchors < 1 || anchors > kMaxAnchors) return false;
    Head& head = p.heads[p.num_heads++];
    head = Head{};
    head.first_anchor = p.num_anchors;
    head.anchors = anchors;
    head.rows = rows;
    head.columns = columns;
    head.stride = stride;
    head.view_scale = view_scale;
    head.view_flip = view_flip;
    for (int a = 0; a < anchors; ++a)
        for (int axis = 0; axis < 2; ++axis) head.anchor_wh[a][axis] = anchor_wh[2 * a + axis];
    if (p.num_heads == 1) p.canvas_width = columns * stride;  // the first view has scale 1
    p.num_anchors += anchors * rows * columns;
    return true;
}

constexpr std::size_t kWorkspaceAlignment = 256;

inline std::size_t aligned(std::size_t bytes) {
    return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

inline std::size_t workspace_bytes(std::size_t batch, std::size_t max_candidates) {
    return aligned(batch * sizeof(ImageState)) + 2 * aligned(batch * max_candidates * sizeof(Key)) +
           aligned(batch * max_candidates * sizeof(Box));
}

// Points the parameters into a workspace of `workspace_bytes(p.batch, p.max_candidates)`, aligned to 256.
inline void bind_workspace(NmsParameters& p, void* workspace) {
    const std::size_t slots = static_cast<std::size_t>(p.batch) * static_cast<std::size_t>(p.max_candidates);
    char* at = static_cast<char*>(workspace);
    p.states = reinterpret_cast<ImageState*>(at);
    at += aligned(static_cast<std::size_t>(p.batch) * sizeof(ImageState));
    p.keys = reinterpret_cast<Key*>(at);
    at += aligned(slots * sizeof(Key));
    p.ranked_keys = reinterpret_cast<Key*>(at);
    at += aligned(slots * sizeof(Key));
    p.ranked_boxes = reinterpret_cast<Box*>(at);
}

// Calls launch(Launch) for each kernel of the post-processing, in stream order. `p.round` must be set to the
// launch's before it is passed on.
template <class F>
void for_each_launch(const NmsParameters& p, F launch) {
    const unsigned images = static_cast<unsigned>(p.batch);
    const int block_anchors = kCollectThreads * kAnchorsPerThread;
    const unsigned blocks = static_cast<unsigned>((p.num_anchors + block_anchors - 1) / block_anchors);
    const unsigned tiles = static_cast<unsigned>((p.max_candidates + kSortTile - 1) / kSortTile);
    launch(Launch{"parkdet_reset", images, 1, kBins, 0});
    launch(Launch{"parkdet_collect", blocks, images, kCollectThreads, 0});
    for (int digit = 0; digit < kDigits; ++digit)
        launch(Launch{"parkdet_select", blocks, images, kCollectThreads, digit});
    launch(Launch{"parkdet_collect", blocks, images, kCollectThreads, 1});
    launch(Launch{"parkdet_sort", tiles, images, kSortThreads, 0});
    launch(Launch{"parkdet_rank", tiles, images, kSortThreads, 0});
    launch(Launch{"parkdet_suppress", images, 1, kSuppressThreads, 0});
}

inline Launch letterbox_launch(const LetterboxParameters& p) {
    return Launch{"parkdet_letterbox", static_cast<unsigned>((p.canvas_width + kLetterboxWidth - 1) / kLetterboxWidth),
                  static_cast<unsigned>((p.canvas_height + kLetterboxHeight - 1) / kLetterboxHeight),
                  kLetterboxWidth * kLetterboxHeight, 0};
}

}  // namespace parkdet
