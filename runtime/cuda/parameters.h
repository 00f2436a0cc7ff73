// What the kernels are told: one struct a launch, passed by value, and the constants that fix launch shapes.
// Plain C++ without an include, so that nvcc, NVRTC and a host compiler read the same text; `kernels.py`
// mirrors it with ctypes, and tests hold the two together. What it all means: README.md beside this file.
#pragma once

namespace parkdet {

typedef unsigned long long Key;  // score bits << 32 | ~(anchor * num_classes + class): the larger goes first

constexpr int kMaxHeads = 16;           // heads of all views together: three views of four levels, less two, are 10
constexpr int kMaxAnchors = 8;          // anchors a cell
constexpr int kCollectThreads = 256;    // one a bin of a histogram
constexpr int kAnchorsPerThread = 4;    // what a thread of `collect` and `select` looks at: loads in flight together
constexpr int kSortThreads = 1024;      // `sort` and `rank`
constexpr int kSortTile = 2048;         // keys that one block sorts in shared memory: 16 KiB
constexpr int kSuppressThreads = 1024;  // 32 warps, so that the lanes of one hold an entry for each of them
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kDigits = 64 / kDigitBits;
constexpr int kLetterboxWidth = 32;  // canvas pixels of a block
constexpr int kLetterboxHeight = 8;

struct alignas(16) Box {
    float x1, y1, x2, y2;  // canvas pixels
};

// One raw output of the network: (batch, anchors, rows, columns, 5 + num_classes), contiguous.
struct Head {
    const void* raw;   // __half where `half_heads`, else float
    int first_anchor;  // index of its first anchor among the image's, in decoded order
    int anchors;       // a cell
    int rows;
    int columns;
    float stride;      // pixels of the view's canvas a cell
    float view_scale;  // boxes are divided by it
    int view_flip;     // 1: the view is mirrored left-right
    int reserved;
    float anchor_wh[kMaxAnchors][2];  // pixels of the view's canvas
};

// Which keys are among the best `max_candidates`: those that begin with a larger prefix, and `needed` more of those
// that begin with this one.
struct Pick {
    Key prefix;
    int needed;
    int reserved;
};

// What one run knows of one image. `reset` zeroes it.
struct ImageState {
    int found[2];  // candidates that the first `collect` met, and those that the second stored
    int reserved[2];
    Pick picks[kDigits];
    int histograms[kDigits][kBins];
};

struct NmsParameters {
    Head heads[kMaxHeads];  // in decoded order: view by view, levels finest first
    int num_heads;
    int num_anchors;  // of one image, all heads
    int num_classes;
    int batch;       // images of this run
    int half_heads;  // 1: heads are float16, 0: float32
    int max_det;
    int max_candidates;
    int multi_label;     // 1: a candidate for every class that passes, 0: for the best class
    int agnostic;        // 1: boxes of different classes suppress one another
    int round;           // `collect`: 0 stores what fits, 1 stores the best; `select`: the digit, 0 is the highest
    float conf;          // objectness, and objectness * class score, must be larger
    float iou;           // a box goes when its IoU with a kept one is larger
    float logit_floor;   // at or under it no sigmoid is larger than conf
    float canvas_width;  // pixels; mirrored views are turned back by it

    // Outputs, row-major; slots from num_dets on hold box 0, score 0, class -1.
    int* num_dets;      // (batch)
    Box* boxes;         // (batch, max_det)
    float* scores;      // (batch, max_det)
    int* classes;       // (batch, max_det)
    int* candidates;    // (batch): how many passed; those over max_candidates were never looked at
    int* at_max_det;    // (batch): 1 where max_det was met with candidates left

    // Workspace.
    ImageState* states;  // (batch)
    Key* keys;           // (batch, max_candidates), in any order, then in sorted tiles
    Key* ranked_keys;    // (batch, max_candidates), best first
    Box* ranked_boxes;   // (batch, max_candidates)
};

// One image onto its canvas.
struct LetterboxParameters {
    const unsigned char* image;  // (image_height, image_width, 3)
    unsigned char* canvas;       // (canvas_height, canvas_width, 3)
    long long image_pitch;       // bytes from one row of the image to the next
    int image_height;
    int image_width;
    int resized_height;
    int resized_width;
    int canvas_height;
    int canvas_width;
    int top;   // rows of the canvas above the resized image
    int left;  // columns before it
};

}  // namespace parkdet
