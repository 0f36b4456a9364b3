// Runs the threads of CUDA kernels on the CPU, the lanes of a warp in lock step, and checks what
// they do. See build.py for how the kernels get here.
//
// Every lane is a fiber: it runs until it wants to meet the others (a shuffle), and goes on when
// all lanes that it named are at the same place. Warps run one after the other, since nothing in
// the kernels lets them wait for each other. The compiler tells of every access to memory, because
// the kernels are compiled with -fsanitize=thread,alignment: what these flags call is defined
// below, instead of in the sanitizers' libraries.

#include <c10/core/CPUAllocator.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lockstep {
namespace {

constexpr int warp_lanes = 32;
constexpr size_t stack_bytes = 256 << 10;
constexpr unsigned most_threads = 1024, most_blocks_y = 65535, most_blocks_x = 0x7fffffff;

// ---- Memory of the device -----------------------------------------------------------------------

// Bytes of every allocation by its address. Torch may allocate in several threads, and free what
// is left after this library's variables are gone.
auto& allocations = *new std::map<const char*, size_t>;
std::mutex allocations_mutex;

// In front of an allocation: an address is a multiple of 16, as kernels may expect, and of no more.
constexpr size_t front = 16;
// Larger ones are mapped when they are touched, and zero.
constexpr size_t huge = size_t{1} << 30;

void free_device_memory(void* block) {
  size_t bytes;
  {
    const std::lock_guard<std::mutex> lock(allocations_mutex);
    const auto found = allocations.find(static_cast<char*>(block) + front);
    bytes = found->second;
    allocations.erase(found);
  }
  if (bytes < huge) {
    std::free(block);
  } else {
    munmap(block, front + bytes);
  }
}

// Torch's allocator while the device is in use. Memory is full of NaN: what a kernel forgets to
// write is seen.
struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    char* block;
    if (bytes < huge) {
      block = static_cast<char*>(std::aligned_alloc(64, (front + bytes + 63) / 64 * 64));
      std::memset(block, 0xff, front + bytes);
    } else {
      block = static_cast<char*>(mmap(
          nullptr, front + bytes, PROT_READ | PROT_WRITE,
          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (block == MAP_FAILED) {
        throw std::bad_alloc();
      }
    }
    const std::lock_guard<std::mutex> lock(allocations_mutex);
    allocations[block + front] = bytes;
    return {block + front, block, &free_device_memory, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

// ---- The launch that is running -----------------------------------------------------------------

// What a lane that waits for others brings.
struct Meeting {
  Collective kind;
  unsigned mask;
  uint64_t bits;
  int operand, width, line;

  bool same_place(const Meeting& other) const {
    return kind == other.kind && mask == other.mask && line == other.line && width == other.width;
  }
};

enum class State { ready, waiting, ended };

struct Lane {
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  Meeting meeting;
  uint64_t result;
};

constexpr uint32_t nobody = 0, everybody = 0xffffffff;

// Memory that the kernel may touch, and who did: per byte 0, the number of the thread that wrote it
// (from 1 on), or `everybody` when it is added to atomically.
struct Region {
  const char *begin, *end;
  bool writable;
  int parameter;  // which of the pointers, from 0 on
  std::vector<uint32_t> owner;
};

Lane lanes[warp_lanes];
const Launch* launch;
std::vector<Region> regions;
dim3 grid, block_now, thread_now;
int warp_start;         // first thread of the warp that runs
int current_lane = -1;  // -1: the scheduler or the host
jmp_buf scheduler;
std::string fault;
std::map<std::string, dim3> grid_limits;

std::string place() {
  std::ostringstream text;
  text << launch->kernel << ", block (" << block_now.x << ", " << block_now.y << ")";
  if (current_lane >= 0) {
    text << ", thread " << thread_now.x;
  }
  return text.str();
}

// Leaves the running lane for good; its stack is never returned to.
[[noreturn]] void fail(const std::string& what) {
  fault = place() + ": " + what;
  current_lane = -1;
  _longjmp(scheduler, 1);
}

void start_lane() {
  launch->run_thread(launch->arguments);
  lanes[current_lane].state = State::ended;
  _longjmp(scheduler, 1);
}

// Until the lane waits, ends or fails.
__attribute__((noinline)) void run_lane(int index) {
  Lane& lane = lanes[index];
  current_lane = index;
  thread_now = dim3(warp_start + index, 0, 0);
  if (_setjmp(scheduler) == 0) {
    if (lane.started) {
      _longjmp(lane.resume, 1);
    }
    lane.started = true;
    setcontext(&lane.start);
  }
  current_lane = -1;
}

void prepare_lane(Lane& lane) {
  getcontext(&lane.start);
  lane.start.uc_stack.ss_sp = lane.stack.get();
  lane.start.uc_stack.ss_size = stack_bytes;
  lane.start.uc_link = nullptr;
  makecontext(&lane.start, start_lane, 0);
  lane.started = false;
  lane.state = State::ready;
}

std::string describe(const Meeting& meeting) {
  const char* const names[] = {"__shfl_sync", "__shfl_xor_sync", "__any_sync"};
  std::ostringstream text;
  text << names[static_cast<int>(meeting.kind)] << " in line " << meeting.line << " with mask 0x"
       << std::hex << meeting.mask;
  return text.str();
}

// The lane whose number this lane gets. Reading one that does not take part is undefined.
int source_lane(int index, const Meeting& meeting) {
  if (meeting.kind == Collective::shuffle) {
    return (index & ~(meeting.width - 1)) | (meeting.operand & (meeting.width - 1));
  }
  return index ^ meeting.operand;
}

// Lets the lanes of the mask exchange what they brought. All of them wait at the same place.
void exchange(unsigned mask) {
  bool any = false;
  for (int i = 0; i < warp_lanes; ++i) {
    any = any || ((mask >> i & 1) && lanes[i].meeting.bits);
  }
  for (int i = 0; i < warp_lanes && fault.empty(); ++i) {
    if (!(mask >> i & 1)) {
      continue;
    }
    const Meeting& meeting = lanes[i].meeting;
    if (meeting.kind == Collective::any) {
      lanes[i].result = any;
      continue;
    }
    const int source = source_lane(i, meeting);
    if (source < 0 || source >= warp_lanes || !(mask >> source & 1)) {
      fault = place() + ": lane " + std::to_string(i) + " reads lane " + std::to_string(source) +
          ", which does not take part, by " + describe(meeting);
    } else {
      lanes[i].result = lanes[source].meeting.bits;
    }
  }
  for (int i = 0; i < warp_lanes; ++i) {
    if (mask >> i & 1) {
      lanes[i].state = State::ready;
    }
  }
}

// One group of waiting lanes goes on, or it is known that none ever will. CUDA does not wait for
// lanes that have ended; this does, since the kernels keep the lanes of a warp together.
void bring_together() {
  std::string waiting;
  for (int i = 0; i < warp_lanes; ++i) {
    if (lanes[i].state != State::waiting) {
      continue;
    }
    const Meeting& meeting = lanes[i].meeting;
    bool complete = true, first_here = true;
    for (int other = 0; other < warp_lanes; ++other) {
      const bool is_here =
          lanes[other].state == State::waiting && meeting.same_place(lanes[other].meeting);
      complete = complete && (is_here || !(meeting.mask >> other & 1));
      first_here = first_here && !(is_here && other < i);
    }
    if (complete) {
      return exchange(meeting.mask);
    }
    if (first_here) {
      waiting += "; lane " + std::to_string(i) + " at " + describe(meeting);
    }
  }
  for (int i = 0; i < warp_lanes; ++i) {
    if (lanes[i].state == State::ended) {
      waiting += "; lane " + std::to_string(i) + " has ended";
      break;
    }
  }
  fault = place() + ": lanes wait for others that do not come" + waiting;
}

void run_warp(int threads) {
  for (int i = 0; i < warp_lanes; ++i) {
    prepare_lane(lanes[i]);
    if (i >= threads) {
      lanes[i].state = State::ended;
    }
  }
  while (fault.empty()) {
    bool waiting = false;
    for (int i = 0; i < warp_lanes && fault.empty(); ++i) {
      if (lanes[i].state == State::ready) {
        run_lane(i);
      }
      waiting = waiting || lanes[i].state == State::waiting;
    }
    if (!waiting) {
      return;
    }
    if (fault.empty()) {
      bring_together();
    }
  }
}

void find_regions() {
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  regions.clear();
  for (size_t i = 0; i < launch->pointers.size(); ++i) {
    const auto [address, writable] = launch->pointers[i];
    if (address == nullptr) {
      continue;
    }
    const char* const wanted = static_cast<const char*>(address);
    const auto next = allocations.upper_bound(wanted);
    const auto found = next == allocations.begin() ? next : std::prev(next);
    if (next == allocations.begin() || wanted >= found->first + found->second) {
      fault = place() + ": pointer " + std::to_string(i) + " is no device memory";
      return;
    }
    const auto [begin, bytes] = *found;
    regions.push_back({begin, begin + bytes, writable, static_cast<int>(i), {}});
    if (writable) {
      regions.back().owner.assign(bytes, nobody);
    }
  }
}

enum class Access { read, write, add };

void check(const void* address, size_t bytes, Access access) {
  if (current_lane < 0) {
    return;
  }
  const char* const first = static_cast<const char*>(address);
  const char* const stack = lanes[current_lane].stack.get();
  if (first >= stack && first + bytes <= stack + stack_bytes) {
    return;
  }
  const char* const verb = access == Access::read ? "reads " : "writes ";
  for (Region& region : regions) {
    if (first < region.begin || first + bytes > region.end) {
      continue;
    }
    if (!region.writable) {
      if (access == Access::read) {
        return;
      }
      fail("writes to pointer " + std::to_string(region.parameter) + ", which is const");
    }
    const uint32_t thread =
        (block_now.y * grid.x + block_now.x) * launch->block.x + thread_now.x + 1;
    for (size_t i = first - region.begin; i < first - region.begin + bytes; ++i) {
      uint32_t& owner = region.owner[i];
      const uint32_t wanted = access == Access::add ? everybody : thread;
      if (owner != nobody && owner != wanted) {
        fail(
            verb + ("byte " + std::to_string(i)) + " of pointer " +
            std::to_string(region.parameter) + ", which " +
            (owner == everybody ? "is added to atomically"
                                : "thread " + std::to_string((owner - 1) % launch->block.x) +
                     " of block " + std::to_string((owner - 1) / launch->block.x) + " wrote"));
      }
      if (access != Access::read) {
        owner = wanted;
      }
    }
    return;
  }
  std::ostringstream text;
  text << verb << bytes << " bytes outside of its memory";
  for (const Region& region : regions) {
    text << "; from pointer " << region.parameter << " (" << region.end - region.begin
         << " bytes): at " << first - region.begin;
  }
  fail(text.str());
}

long additions[5];  // by how many numbers they add

template <typename T>
void add_numbers(T* to, const T* numbers, int count) {
  ++additions[count];
  if (reinterpret_cast<uintptr_t>(to) % (count * sizeof(T)) != 0) {
    fail(
        "adds to " + std::to_string(count * sizeof(T)) +
        " bytes at an address that is no multiple of it");
  }
  check(to, count * sizeof(T), Access::add);
  for (int i = 0; i < count; ++i) {
    to[i] += numbers[i];
  }
}

}  // namespace

dim3 thread_index() { return thread_now; }
dim3 block_index() { return block_now; }
dim3 block_size() { return launch->block; }
dim3 grid_size() { return grid; }

void add(float* to, const float* numbers, int count) { add_numbers(to, numbers, count); }
void add(double* to, const double* numbers, int count) { add_numbers(to, numbers, count); }

uint64_t meet(Collective kind, unsigned mask, uint64_t bits, int operand, int width, int line) {
  Lane& lane = lanes[current_lane];
  lane.meeting = {kind, mask, bits, operand, width, line};
  if (!(mask >> current_lane & 1)) {
    fail("a lane does not name itself in " + describe(lane.meeting));
  }
  if (width < 1 || width > warp_lanes || (width & (width - 1)) != 0) {
    fail("the width is no power of two in " + describe(lane.meeting));
  }
  lane.state = State::waiting;
  if (_setjmp(lane.resume) == 0) {
    _longjmp(scheduler, 1);
  }
  return lane.result;
}

void run(const Launch& wanted) {
  launch = &wanted;
  fault.clear();
  grid = wanted.grid;
  block_now = dim3(0, 0, 0);
  const dim3& block = wanted.block;
  if (grid.x == 0 || grid.y == 0 || grid.x > most_blocks_x || grid.y > most_blocks_y ||
      block.x == 0 || block.x > most_threads || grid.z * block.y * block.z != 1) {
    fault = place() + ": a grid that CUDA, or this program, does not launch";
  } else {
    if (const auto limit = grid_limits.find(wanted.kernel); limit != grid_limits.end()) {
      grid.x = std::min(grid.x, limit->second.x);
      grid.y = std::min(grid.y, limit->second.y);
    }
    find_regions();
  }
  for (unsigned y = 0; y < grid.y && fault.empty(); ++y) {
    for (unsigned x = 0; x < grid.x && fault.empty(); ++x) {
      block_now = dim3(x, y, 0);
      for (warp_start = 0; warp_start < static_cast<int>(block.x) && fault.empty();
           warp_start += warp_lanes) {
        run_warp(block.x - warp_start);
      }
    }
  }
  launch = nullptr;
  regions.clear();
  if (!fault.empty()) {
    throw std::runtime_error(fault);
  }
}

}  // namespace lockstep

// ---- What Python calls --------------------------------------------------------------------------

#define VISIBLE extern "C" __attribute__((visibility("default")))

// New tensors on the CPU lie in the memory of the device from here on, or no longer.
VISIBLE void lockstep_use_device_memory(bool use) {
  static lockstep::DeviceAllocator device;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(use ? &device : usual, /*priority=*/255);
}

// How often kernels added this many numbers at once, so far.
VISIBLE long lockstep_additions(int count) { return lockstep::additions[count]; }

// Launches this kernel with fewer blocks than asked for, to see whether they share out the rest.
VISIBLE void lockstep_limit_grid(const char* kernel, unsigned x, unsigned y) {
  lockstep::grid_limits[kernel] = dim3(x, y);
}

VISIBLE void lockstep_lift_limits() { lockstep::grid_limits.clear(); }

// ---- What the compiler calls because of -fsanitize=thread,alignment -----------------------------

using lockstep::Access;
using lockstep::check;

#define CHECKS(name, bytes)                                                                \
  extern "C" void __tsan_read##name(const void* at) { check(at, bytes, Access::read); }    \
  extern "C" void __tsan_write##name(const void* at) { check(at, bytes, Access::write); }
CHECKS(1, 1)
CHECKS(2, 2)
CHECKS(4, 4)
CHECKS(8, 8)
CHECKS(16, 16)
#define UNALIGNED_CHECKS(bytes)                                  \
  extern "C" void __tsan_unaligned_read##bytes(const void* at) { \
    check(at, bytes, Access::read);                              \
  }                                                              \
  extern "C" void __tsan_unaligned_write##bytes(const void* at) { check(at, bytes, Access::write); }
UNALIGNED_CHECKS(2)
UNALIGNED_CHECKS(4)
UNALIGNED_CHECKS(8)
UNALIGNED_CHECKS(16)
extern "C" void __tsan_read_range(const void* at, size_t bytes) { check(at, bytes, Access::read); }
extern "C" void __tsan_write_range(const void* at, size_t bytes) {
  check(at, bytes, Access::write);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(const void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}


// std::atomic, in torch's headers: the host's business.
#define ATOMICS(bits, T)                                                                        \
  extern "C" T __tsan_atomic##bits##_load(const T* at, int) { return __atomic_load_n(at, 5); }  \
  extern "C" void __tsan_atomic##bits##_store(T* at, T to, int) { __atomic_store_n(at, to, 5); } \
  extern "C" T __tsan_atomic##bits##_exchange(T* at, T to, int) {                               \
    return __atomic_exchange_n(at, to, 5);                                                      \
  }                                                                                             \
  extern "C" T __tsan_atomic##bits##_fetch_add(T* at, T by, int) {                              \
    return __atomic_fetch_add(at, by, 5);                                                       \
  }                                                                                             \
  extern "C" T __tsan_atomic##bits##_fetch_sub(T* at, T by, int) {                              \
    return __atomic_fetch_sub(at, by, 5);                                                       \
  }                                                                                             \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(                                \
      T* at, T* from, T to, int, int) {                                                         \
    return __atomic_compare_exchange_n(at, from, to, false, 5, 5);                              \
  }                                                                                             \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_weak(                                  \
      T* at, T* from, T to, int, int) {                                                         \
    return __atomic_compare_exchange_n(at, from, to, true, 5, 5);                               \
  }
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

struct MisalignedAccess {  // as compilers lay it out: version 1
  const char* file;
  uint32_t line, column;
  const struct {
    uint16_t kind, info;
    char name[1];
  } * type;
  uint8_t log_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const MisalignedAccess* access, uintptr_t address) {
  if (lockstep::current_lane >= 0) {
    std::ostringstream text;
    text << "line " << access->line << ": " << access->type->name << " at an address that is no "
         << "multiple of " << (1 << access->log_alignment) << " (rest "
         << address % (1u << access->log_alignment) << ")";
    lockstep::fail(text.str());
  }
}
