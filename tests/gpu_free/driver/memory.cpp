// Device and pinned memory: each allocation ends at a page that nobody may touch, and device memory may be touched
// only while an operation of a stream runs. What is written into the slack before the guard page is found as well.
#include "simulation.h"

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace simulation {
namespace {

constexpr size_t ALIGNMENT = 256; // of cuMemAlloc
constexpr unsigned char FRESH = 0xCD, CANARY = 0xA5;

struct Block {
    char* mapping;
    size_t mapped; // without the guard pages
    size_t bytes;
};
std::map<uintptr_t, Block> device, pinned; // by the address that the caller has
int accesses = 0;
char const* current_operation = "the host";

size_t page() {
    static size_t const bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

void explain_fault(int, siginfo_t* info, void*) {
    // Only what may be called from a signal handler; the address says which allocation was left, and where.
    char text[256];
    int const length = snprintf(text, sizeof text, "simulated CUDA: %s touched %p, which it may not\n",
                                current_operation, info->si_addr);
    if (write(2, text, size_t(length)) < 0)
        _exit(98);
    _exit(99);
}

void watch_faults() {
    static bool const watching = [] {
        struct sigaction action {};
        action.sa_sigaction = explain_fault;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGSEGV, &action, nullptr);
        return true;
    }();
    (void)watching;
}

bool map(std::map<uintptr_t, Block>& blocks, size_t bytes, int protection, uintptr_t* address) {
    watch_faults();
    size_t const aligned = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t const mapped = (aligned + page() - 1) / page() * page();
    void* const whole = mmap(nullptr, mapped + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED)
        return false;
    char* const mapping = static_cast<char*>(whole) + page();
    mprotect(mapping, mapped, PROT_READ | PROT_WRITE);
    char* const start = mapping + mapped - aligned;
    if (bytes <= (64 << 20)) // larger ones stay untouched until used: tests allocate more than the machine has
        memset(start, FRESH, bytes);
    memset(start + bytes, CANARY, aligned - bytes);
    mprotect(mapping, mapped, protection);
    *address = uintptr_t(start);
    blocks[*address] = {mapping, mapped, bytes};
    return true;
}

void unmap(std::map<uintptr_t, Block>& blocks, std::map<uintptr_t, Block>::iterator at) {
    munmap(at->second.mapping - page(), at->second.mapped + 2 * page());
    blocks.erase(at);
}

bool inside(std::map<uintptr_t, Block> const& blocks, uintptr_t address, size_t bytes) {
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin())
        return false;
    --after;
    return address - after->first <= after->second.bytes && bytes <= after->second.bytes - (address - after->first);
}

size_t sum(std::map<uintptr_t, Block> const& blocks) {
    size_t total = 0;
    for (auto const& [address, block] : blocks)
        total += block.bytes;
    return total;
}

} // namespace

size_t device_bytes_total() {
    static size_t const bytes = [] {
        char const* const set = getenv("SIMULATED_CUDA_MEMORY");
        return set ? size_t(strtoull(set, nullptr, 10)) : size_t(8) << 30;
    }();
    return bytes;
}

Result allocate_device(DevicePointer* pointer, size_t bytes) {
    if (!bytes || !pointer)
        return INVALID_VALUE;
    uintptr_t address = 0;
    if (bytes > device_bytes_total() - sum(device) || !map(device, bytes, accesses ? PROT_READ | PROT_WRITE : PROT_NONE, &address))
        return OUT_OF_MEMORY;
    *pointer = address;
    return SUCCESS;
}

Result free_device(DevicePointer pointer) {
    if (!pointer)
        return SUCCESS;
    auto const found = device.find(uintptr_t(pointer));
    if (found == device.end())
        return INVALID_VALUE;
    finish_device(); // cuMemFree waits for what is under way
    unmap(device, found);
    return SUCCESS;
}

Result allocate_pinned(void** pointer, size_t bytes) {
    if (!bytes || !pointer)
        return INVALID_VALUE;
    uintptr_t address = 0;
    if (!map(pinned, bytes, PROT_READ | PROT_WRITE, &address))
        return OUT_OF_MEMORY;
    *pointer = reinterpret_cast<void*>(address);
    return SUCCESS;
}

Result free_pinned(void* pointer) {
    auto const found = pinned.find(uintptr_t(pointer));
    if (found == pinned.end())
        return INVALID_VALUE;
    finish_device();
    unmap(pinned, found);
    return SUCCESS;
}

bool on_device(DevicePointer pointer, size_t bytes) { return inside(device, uintptr_t(pointer), bytes); }
bool is_pinned(void const* pointer, size_t bytes) { return inside(pinned, uintptr_t(pointer), bytes); }
size_t device_bytes_in_use() { return sum(device); }
size_t pinned_bytes_in_use() { return sum(pinned); }

void forget_memory() {
    for (auto* blocks : {&device, &pinned})
        while (!blocks->empty())
            unmap(*blocks, blocks->begin());
}

DeviceAccess::DeviceAccess(char const* operation) {
    current_operation = operation;
    if (accesses++ == 0)
        for (auto const& [address, block] : device)
            mprotect(block.mapping, block.mapped, PROT_READ | PROT_WRITE);
}

DeviceAccess::~DeviceAccess() {
    if (--accesses)
        return;
    for (auto const& [address, block] : device) {
        size_t const slack = (ALIGNMENT - block.bytes % ALIGNMENT) % ALIGNMENT;
        char* const end = reinterpret_cast<char*>(address) + block.bytes;
        for (size_t i = 0; i < slack; i++)
            if (static_cast<unsigned char>(end[i]) != CANARY) {
                complain("%s wrote %zu bytes after the end of an allocation of %zu", current_operation, i + 1, block.bytes);
                end[i] = char(CANARY);
                fail_asynchronously(ILLEGAL_ADDRESS);
            }
        mprotect(block.mapping, block.mapped, PROT_NONE);
    }
    current_operation = "the host";
}

} // namespace simulation
