// Executes kernels on the host: blocks as a loop, the threads of a block as fibers on one OS
// thread.
//
// A fiber runs until it ends or waits at a barrier or a warp call, and a warp until all of it waits
// at a barrier. So each runs as far ahead of the others as CUDA permits, in an order that the test
// chooses: a missing barrier changes results between orders. Reported as errors: waiting for a
// thread that ended or waits elsewhere, lanes that disagree on a mask, values from lanes outside
// it, writes past the end of shared memory, launches no GPU takes, and whatever raises a signal
// (guard pages around memory; traps of -fsanitize=bounds,alignment). Shared memory starts as NaN in
// every block.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kSharedUnasked = 48 << 10;  // what every GPU gives without being asked
constexpr size_t kSharedLimit = 227 << 10;   // what one gives a kernel that has asked
constexpr int kProcessors = 4;
constexpr size_t kSharedGuard = 8 << 10;
constexpr unsigned char kPoison = 0xff;  // makes NaNs
constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

}  // namespace

namespace fastflow {
thread_local
    __attribute__((aligned(16))) unsigned char dynamic_shared_memory[kSharedLimit + kSharedGuard];
}  // namespace fastflow

namespace {

using cuda_shim::WarpCall;
using fastflow::dynamic_shared_memory;

enum class State { kReady, kAtBarrier, kAtWarpCall, kDone };

struct Fiber {
  State state;
  bool started;
  ucontext_t start;  // entered once ...
  jmp_buf context;   // ... and left and resumed without system calls
  WarpCall call;     // while at a warp call
  unsigned mask;
  uint64_t value;  // brought, then received
  int source;
};

std::vector<Fiber> fibers;
std::vector<char> stacks;
const std::function<void()>* body;
int current;
jmp_buf scheduler;
sigjmp_buf interrupted;
unsigned order_seed;  // 0: ascending, 1: descending, else random
std::map<const void*, size_t> allowed_shared;
std::string message;

struct Failure {};

[[noreturn]] void fail(const std::string& what) {
  const auto text = [](dim3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  };
  message = what + " in block " + text(blockIdx) + ", thread " + std::to_string(current);
  throw Failure{};
}

void run_body() {
  (*body)();
  fibers[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

void suspend(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].context)) _longjmp(scheduler, 1);
}

void resume(int index) {
  Fiber& fiber = fibers[index];
  current = index;
  threadIdx =
      dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

std::vector<int> shuffled(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
  return order;
}

// Completes the warp calls of a warp whose lanes have all come; all its fibers have stopped.
bool complete_warp_calls(int first) {
  bool progress = false;
  const int threads = int(fibers.size());
  for (int index = first; index < std::min(first + kWarp, threads); ++index) {
    if (fibers[index].state != State::kAtWarpCall) continue;
    const unsigned mask = fibers[index].mask;
    current = index;
    if (!(mask >> (index - first) & 1)) fail("a warp call whose mask lacks the calling lane");
    uint64_t values[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= threads) fail("a warp call whose mask has lanes beyond the block");
      const Fiber& other = fibers[first + lane];
      if (other.state == State::kDone) fail("a warp call waits for a thread that has ended");
      if (other.state == State::kAtBarrier) fail("a warp call waits for a thread at a barrier");
      if (other.mask != mask || other.call != fibers[index].call)
        fail("lanes of a warp call that disagree");
      values[lane] = other.value;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = fibers[first + lane];
      current = first + lane;
      if (fiber.source < 0 || fiber.source >= kWarp || !(mask >> fiber.source & 1))
        fail("a shuffle from a lane outside the mask");
      fiber.value = values[fiber.source];
      fiber.state = State::kReady;
    }
    progress = true;
  }
  return progress;
}

// True if there was a barrier to pass, false if all threads have ended.
bool pass_barrier() {
  const auto waits = [](const Fiber& fiber) { return fiber.state == State::kAtBarrier; };
  const size_t waiting = std::count_if(fibers.begin(), fibers.end(), waits);
  if (waiting == 0) return false;
  if (waiting < fibers.size()) fail("a barrier that some threads of the block never reach");
  for (Fiber& fiber : fibers) fiber.state = State::kReady;
  return true;
}

void prepare(Fiber& fiber, char* stack) {
  fiber.state = State::kReady;
  fiber.started = false;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_body, 0);
}

void run_block(size_t shared_bytes) {
  std::fill_n(dynamic_shared_memory, shared_bytes + kSharedGuard, kPoison);
  for (size_t i = 0; i < fibers.size(); ++i) prepare(fibers[i], stacks.data() + i * kStackBytes);
  const int threads = int(fibers.size());
  const std::vector<int> warps = shuffled((threads + kWarp - 1) / kWarp), lanes = shuffled(kWarp);
  do {
    for (int warp : warps) {
      const int first = warp * kWarp;
      do {
        for (int lane : lanes)
          if (first + lane < threads && fibers[first + lane].state == State::kReady)
            resume(first + lane);
      } while (complete_warp_calls(first));
    }
  } while (pass_barrier());
  for (size_t i = shared_bytes; i < shared_bytes + kSharedGuard; ++i)
    if (dynamic_shared_memory[i] != kPoison) fail("a write past the end of shared memory");
}

void run_grid(size_t shared_bytes) {
  for (int index : shuffled(int(gridDim.x * gridDim.y * gridDim.z))) {
    blockIdx =
        dim3(index % gridDim.x, index / gridDim.x % gridDim.y, index / (gridDim.x * gridDim.y));
    run_block(shared_bytes);
  }
}

void on_signal(int signal) { siglongjmp(interrupted, signal); }

size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }
size_t whole_pages(size_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

}  // namespace

namespace cuda_shim {

void sync_threads() { suspend(State::kAtBarrier); }

uint64_t meet_warp(WarpCall call, unsigned mask, uint64_t value, int source) {
  Fiber& fiber = fibers[current];
  fiber.call = call, fiber.mask = mask, fiber.value = value, fiber.source = source;
  suspend(State::kAtWarpCall);
  return fiber.value;
}

int lane() { return current % kWarp; }

cudaError_t allow_shared(const void* function, int bytes) {
  if (bytes < 0 || size_t(bytes) > kSharedLimit) {
    message = "more shared memory than any GPU has";
    return cudaErrorInvalidValue;
  }
  allowed_shared[function] = size_t(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function,
                   const std::function<void()>& kernel) {
  const auto asked = allowed_shared.find(function);
  const size_t allowed =
      std::max(kSharedUnasked, asked == allowed_shared.end() ? 0 : asked->second);
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!threads || threads > 1024 || !grid.x || grid.x > 0x7fffffffu || !grid.y || grid.y > 65535 ||
      !grid.z || grid.z > 65535 || config.dynamicSmemBytes > allowed) {
    message = "invalid launch configuration";
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid, blockDim = block, body = &kernel;
  fibers.resize(threads);
  stacks.resize(threads * kStackBytes);

  struct sigaction action{}, previous[std::size(kSignals)];
  action.sa_handler = on_signal;
  action.sa_flags = SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous[i]);
  cudaError_t error = cudaSuccess;
  try {
    if (const int signal = sigsetjmp(interrupted, 1))
      fail(std::string(strsignal(signal)) + ": an access outside memory, an array or alignment,");
    run_grid(config.dynamicSmemBytes);
  } catch (const Failure&) {
    error = cudaErrorLaunchFailure;
  }
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous[i], nullptr);
  return error;
}

}  // namespace cuda_shim

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : message.c_str();
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kProcessors : int(kSharedLimit);
  return cudaSuccess;
}

extern "C" {

// The order in which threads and blocks run: 0 ascending, 1 descending, else a random one.
void cuda_shim_set_order(unsigned seed) { order_seed = seed; }

// Memory that starts as NaN and ends at an unreadable page; it is also preceded by one.
void* cuda_shim_allocate(size_t bytes) {
  const size_t inner = whole_pages(bytes), page = page_bytes();
  void* const all = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const start = static_cast<char*>(all) + page;
  mprotect(start, inner, PROT_READ | PROT_WRITE);
  std::memset(start, kPoison, inner);
  return start + inner - bytes;
}

void cuda_shim_free(void* memory, size_t bytes) {
  const size_t inner = whole_pages(bytes), page = page_bytes();
  munmap(static_cast<char*>(memory) + bytes - inner - page, inner + 2 * page);
}

}  // extern "C"
