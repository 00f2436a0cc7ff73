// run_cases FILE SECONDS: runs the cases that cases.py wrote, each array in memory of its own and of exactly its size,
// until one gives something else (exit code 1), a launch itself fails (2) or so much CPU time is gone. The plan is
// plan.h's, so this is also its test. The kernels are a file of their own, device_code.cpp, compiled anew for a mutant.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "cuda_runtime.h"

#include "plan.h"

extern "C" {
void parkdet_reset(parkdet::NmsParameters);
void parkdet_collect(parkdet::NmsParameters);
void parkdet_select(parkdet::NmsParameters);
void parkdet_sort(parkdet::NmsParameters);
void parkdet_rank(parkdet::NmsParameters);
void parkdet_suppress(parkdet::NmsParameters);
void parkdet_letterbox(parkdet::LetterboxParameters);
float sigmoid_under_test(float raw);
}

namespace {

constexpr size_t kGuard = 64;  // bytes on either side that must stay as they were
constexpr unsigned char kRubbish = 0xcd;

FILE* file;
char name[64];
int failures = 0;

template <class T>
T read() {
    T value;
    if (fread(&value, sizeof value, 1, file) != 1) exit(3);
    return value;
}

void report(const char* what) {
    printf("%s: %s\n", name, what);
    ++failures;
}

// Memory full of rubbish. With the address sanitizer the guards are malloc's. Of many elements before those that are
// used there are only addresses.
template <class T>
struct Memory {
    size_t bytes;
    char* base;
    size_t before;
    char* addresses = nullptr;

    explicit Memory(size_t count, size_t unused = 0) : bytes(count * sizeof(T)), before(unused * sizeof(T)) {
        if (before) {
            void* const mapped = mmap(nullptr, before + bytes + 2 * kGuard, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (mapped == MAP_FAILED) {
                perror("addresses for the images before");
                exit(3);
            }
            addresses = static_cast<char*>(mapped);
            base = addresses + before;
            memset(base, kRubbish, bytes + 2 * kGuard);
            return;
        }
#ifdef __SANITIZE_ADDRESS__
        base = static_cast<char*>(malloc(bytes)) - kGuard;
        memset(base + kGuard, kRubbish, bytes);
#else
        base = static_cast<char*>(aligned_alloc(64, (bytes + 2 * kGuard + 63) / 64 * 64));
        memset(base, kRubbish, bytes + 2 * kGuard);
#endif
    }
    ~Memory() {
#ifdef __SANITIZE_ADDRESS__
        if (!addresses) {
            free(base + kGuard);
            return;
        }
#endif
        for (size_t i = 0; i < kGuard; ++i)
            if (static_cast<unsigned char>(base[i]) != kRubbish ||
                static_cast<unsigned char>(base[kGuard + bytes + i]) != kRubbish) {
                report("wrote out of bounds");
                break;
            }
        if (addresses) munmap(addresses, before + bytes + 2 * kGuard);
        else free(base);
    }
    Memory(const Memory&) = delete;
    T* data() { return reinterpret_cast<T*>(base + kGuard - before); }
    void fill_from_file() {
        if (bytes && fread(base + kGuard, bytes, 1, file) != 1) exit(3);
    }
    void expect_from_file(const char* what) {
        char* right = static_cast<char*>(malloc(bytes + 1));
        if (bytes && fread(right, bytes, 1, file) != 1) exit(3);
        if (memcmp(right, base + kGuard, bytes)) report(what);
        free(right);
    }
};

template <class Parameters, void (*kernel)(Parameters)>
void run(const parkdet::Launch& launch, const Parameters& parameters, unsigned schedule, uint3 first = {0, 0, 0}) {
    const char* problem = simt::run(
        dim3(launch.grid_x, launch.grid_y), dim3(launch.threads), schedule,
        [](const void* p) { kernel(*static_cast<const Parameters*>(p)); }, &parameters, first);
    if (problem) {
        printf("%s: %s: %s\n", name, launch.entry, problem);
        exit(2);
    }
}

void run_nms(unsigned schedule) {
    using namespace parkdet;
    NmsParameters p{};
    const int runs = read<int>();
    const int images_before = read<int>();
    const int heads = read<int>();
    p.num_classes = read<int>();
    p.batch = images_before + read<int>();
    p.half_heads = read<int>();
    p.max_det = read<int>();
    p.max_candidates = read<int>();
    p.multi_label = read<int>();
    p.agnostic = read<int>();
    p.conf = read<float>();
    p.iou = read<float>();
    p.logit_floor = logit_floor(p.conf);
    Memory<char>* raw[kMaxHeads];
    for (int i = 0; i < heads; ++i) {
        const int anchors = read<int>(), rows = read<int>(), columns = read<int>();
        const float stride = read<float>(), scale = read<float>();
        const int flip = read<int>();
        float shapes[2 * kMaxAnchors];
        for (int a = 0; a < 2 * anchors; ++a) shapes[a] = read<float>();
        if (!add_head(p, anchors, rows, columns, stride, scale, flip, shapes)) exit(3);
        const size_t image = size_t(anchors) * rows * columns * (5 + p.num_classes) * (p.half_heads ? 2 : 4);
        raw[i] = new Memory<char>((p.batch - images_before) * image, images_before * image);
        raw[i]->fill_from_file();
        p.heads[i].raw = raw[i]->data();
    }
    const size_t before = size_t(images_before), batch = size_t(p.batch) - before;
    const size_t kept = batch * p.max_det, slots = batch * p.max_candidates;
    const size_t kept_before = before * p.max_det, slots_before = before * p.max_candidates;
    {
        Memory<int> num_dets(batch, before), candidates(batch, before), at_max_det(batch, before);
        Memory<int> classes(kept, kept_before);
        Memory<Box> boxes(kept, kept_before), ranked_boxes(slots, slots_before);
        Memory<float> scores(kept, kept_before);
        Memory<ImageState> states(batch, before);
        Memory<Key> keys(slots, slots_before), ranked_keys(slots, slots_before);
        p.num_dets = num_dets.data();
        p.candidates = candidates.data();
        p.at_max_det = at_max_det.data();
        p.boxes = boxes.data();
        p.scores = scores.data();
        p.classes = classes.data();
        p.states = states.data();
        p.keys = keys.data();
        p.ranked_keys = ranked_keys.data();
        p.ranked_boxes = ranked_boxes.data();
        const auto launched = [&](const Launch& launch) {
            p.round = launch.round;
            const uint3 first = launch.grid_y == 1 ? uint3{unsigned(before), 0, 0}
                                                  : uint3{0, unsigned(before), 0};
            const char* entry = launch.entry + strlen("parkdet_");
            if (!strcmp(entry, "reset")) run<NmsParameters, parkdet_reset>(launch, p, schedule, first);
            else if (!strcmp(entry, "collect")) run<NmsParameters, parkdet_collect>(launch, p, schedule, first);
            else if (!strcmp(entry, "select")) run<NmsParameters, parkdet_select>(launch, p, schedule, first);
            else if (!strcmp(entry, "sort")) run<NmsParameters, parkdet_sort>(launch, p, schedule, first);
            else if (!strcmp(entry, "rank")) run<NmsParameters, parkdet_rank>(launch, p, schedule, first);
            else if (!strcmp(entry, "suppress")) run<NmsParameters, parkdet_suppress>(launch, p, schedule, first);
            else exit(3);
        };
        // Run after run in the same memory: what the last one left must not matter.
        for (int left = runs; left > 0; --left) for_each_launch(p, launched);
        num_dets.expect_from_file("num_dets");
        candidates.expect_from_file("candidates");
        at_max_det.expect_from_file("at_max_det");
        boxes.expect_from_file("boxes");
        scores.expect_from_file("scores");
        classes.expect_from_file("classes");
    }
    for (int i = 0; i < heads; ++i) delete raw[i];
}

void run_letterbox(unsigned schedule) {
    using namespace parkdet;
    LetterboxParameters p{};
    p.image_height = read<int>();
    p.image_width = read<int>();
    p.image_pitch = read<int>();
    p.resized_height = read<int>();
    p.resized_width = read<int>();
    p.canvas_height = read<int>();
    p.canvas_width = read<int>();
    p.top = read<int>();
    p.left = read<int>();
    // The last row ends with its last pixel.
    const size_t gap = size_t(p.image_pitch) - 3 * size_t(p.image_width);
    Memory<unsigned char> image(size_t(p.image_height) * p.image_pitch - gap);
    image.fill_from_file();
    for (size_t i = 0; i < gap; ++i) read<char>();
    Memory<unsigned char> canvas(size_t(p.canvas_height) * p.canvas_width * 3);
    p.image = image.data();
    p.canvas = canvas.data();
    run<LetterboxParameters, parkdet_letterbox>(letterbox_launch(p), p, schedule);
    canvas.expect_from_file("canvas");
}

void run_sigmoid() {
    const size_t count = read<unsigned>();
    Memory<float> values(count);
    values.fill_from_file();
    for (size_t i = 0; i < count; ++i) values.data()[i] = sigmoid_under_test(values.data()[i]);
    values.expect_from_file("values");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3 || !(file = fopen(argv[1], "rb"))) return 3;
    const rlimit seconds = {static_cast<rlim_t>(atoi(argv[2])), RLIM_INFINITY};
    setrlimit(RLIMIT_CPU, &seconds);  // a mutant may loop for ever
    for (int left = read<int>(); left > 0; --left) {
        const int kind = read<int>();
        if (fread(name, sizeof name, 1, file) != 1) return 3;
        const unsigned schedule = unsigned(read<int>());
        if (kind == 0) run_nms(schedule);
        else if (kind == 1) run_letterbox(schedule);
        else run_sigmoid();
        if (failures) break;
    }
    return failures ? 1 : 0;
}
