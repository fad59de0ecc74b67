#include "kernels/emulator/machine.hpp"

#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace kv::emulator {

thread_local Thread* here = nullptr;
thread_local char declared[16];  // what kernels declare as shared lies around here

namespace {

constexpr int lanes = 32;
constexpr std::size_t stack_bytes = 64 << 10, shared_most = 227 << 10, shared_alignment = 1024;
constexpr unsigned char unset = 0xff;  // a NaN, and -1
constexpr std::uint32_t declared_address = 3u << 30;
constexpr int most_passes = 1 << 24;   // in which nobody goes on
constexpr int most_moments = 1 << 22;  // in which no block tells others

/// What a block runs on: kept from launch to launch.
struct Processor {
  boost::context::pooled_fixedsize_stack stacks{stack_bytes};
  std::unique_ptr<char[]> memory = std::make_unique<char[]>(shared_most + shared_alignment);
  char* shared() const {
    const auto at = reinterpret_cast<std::uintptr_t>(memory.get());
    return memory.get() + (shared_alignment - at % shared_alignment) % shared_alignment;
  }
};

/// Lends processors to the threads of launches.
class Processors {
 public:
  std::unique_ptr<Processor> take() {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) return std::make_unique<Processor>();
    std::unique_ptr<Processor> processor = std::move(idle_.back());
    idle_.pop_back();
    return processor;
  }
  void give(std::unique_ptr<Processor> processor) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(processor));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Processor>> idle_;
};

Processors& processors() {
  static Processors all;
  return all;
}

std::atomic<unsigned> drawn_by = 0;

struct Launched {
  Index grid, threads;
  std::size_t shared_bytes;
  const std::function<void()>* kernel;
  std::atomic<bool> failed = false;
  std::atomic<unsigned> told = 0;  // by blocks to others
};

struct Copy {
  std::uint32_t to;
  const void* from;
  std::size_t bytes;
  unsigned group;
};

struct Box {
  std::uint32_t to;
  const TileMap* from;
  int channel, row, unit;
  std::uint32_t barrier;
};

struct Fiber : Thread {
  boost::context::fiber own, scheduler;
  std::deque<Copy> copies;
  unsigned open_group = 0;
  bool done = false;
};

}  // namespace

struct Warp {
  Meeting meeting[2];                    // in turn: who is ahead does not overwrite what others still read
  std::uint32_t ready = 0, waiting = 0;  // lanes that can go on, that wait at a meeting of the warp
  const char* what = nullptr;            // that meeting
  int alive = 0;
  unsigned meetings = 0;
};

struct Block {
  Launched& launch;
  Index index;
  Processor& processor;
  std::minstd_rand draw;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<std::uint32_t> at_barrier;  // by warp
  int alive = 0, arrived = 0;
  bool any = false, any_before = false;  // brought to the present barrier and to the last
  struct {
    int arrived = 0;
    unsigned passed = 0;
  } named[16];
  std::vector<Box> boxes;  // that have not landed
  int passes = 0, moments = 0;
  unsigned told_before = 0;  // Launched::told when `moments` was 0
  std::exception_ptr error;

  Block(Launched& launched, Index at, Processor& on)
      : launch(launched), index(at), processor(on), draw(1 + drawn_by + at.x * 7919u + at.y * 104729u) {
    const auto count = static_cast<std::size_t>(launch.threads.x);
    if (count % lanes != 0) throw std::logic_error("emulator: a block is whole warps");
    warps.resize(count / lanes), fibers.resize(count), at_barrier.resize(count / lanes);
    alive = static_cast<int>(count);
    std::memset(processor.shared(), unset, launch.shared_bytes);
    for (std::size_t i = 0; i < count; ++i) start(i);
  }

  void start(std::size_t i) {
    Fiber& f = fibers[i];
    f.index.x = static_cast<unsigned>(i), f.lane = static_cast<int>(i % lanes);
    f.block = this, f.warp = &warps[i / lanes];
    ++f.warp->alive, f.warp->ready |= 1u << f.lane;
    f.own = boost::context::fiber(std::allocator_arg, processor.stacks, [this, &f](boost::context::fiber&& scheduler) {
      f.scheduler = std::move(scheduler);
      try {
        (*launch.kernel)();
      } catch (const boost::context::detail::forced_unwind&) {
        throw;
      } catch (...) {
        error = std::current_exception();
      }
      f.done = true;
      return std::move(f.scheduler);
    });
  }

  void run() {
    while (alive > 0 && !error) {
      std::array<Warp*, 32> can{};
      std::size_t count = 0;
      for (Warp& warp : warps)
        if (warp.ready != 0) can[count++] = &warp;
      if (count == 0) throw std::logic_error("emulator: no thread can go on: " + stuck());
      const auto drawn = draw();
      Warp& warp = *can[drawn % count];
      const bool backwards = (drawn >> 12 & 1) != 0;
      for (std::uint32_t left = std::exchange(warp.ready, 0); left != 0 && !error;) {
        const int lane = backwards ? 31 - std::countl_zero(left) : std::countr_zero(left);
        left &= ~(1u << lane);
        resume(fibers[static_cast<std::size_t>(&warp - warps.data()) * lanes + static_cast<std::size_t>(lane)]);
      }
    }
    if (error) std::rethrow_exception(error);
    if (!boxes.empty()) throw std::logic_error("emulator: a block ends before its copies");
  }

  void resume(Fiber& f) {
    here = &f;
    f.own = std::move(f.own).resume();
    if (!f.done) return;
    --alive, --f.warp->alive;
    if (arrived == alive && arrived > 0) open_barrier();
  }

  void open_barrier() {
    arrived = 0, any_before = any, any = false;
    for (std::size_t w = 0; w < warps.size(); ++w) warps[w].ready |= std::exchange(at_barrier[w], 0);
  }

  std::string stuck() const {
    std::string all;
    for (std::size_t w = 0; w < warps.size(); ++w)
      all += "warp " + std::to_string(w) + ": " + std::to_string(std::popcount(at_barrier[w])) +
             " lanes at a barrier, " + std::to_string(std::popcount(warps[w].waiting)) + " at " +
             (warps[w].what ? warps[w].what : "nothing") + ", " + std::to_string(lanes - warps[w].alive) + " gone; ";
    return all;
  }
};

namespace {

Fiber& self() { return static_cast<Fiber&>(*here); }
void leave(Fiber& f) { f.scheduler = std::move(f.scheduler).resume(); }

void land(const Copy& copy) {
  char* to = at_shared(copy.to, copy.bytes);
  copy.from ? static_cast<void>(std::memcpy(to, copy.from, copy.bytes))
            : static_cast<void>(std::memset(to, 0, copy.bytes));
}

}  // namespace

const Index& block_index() { return here->block->index; }
const Index& block_size() { return here->block->launch.threads; }
const Index& grid_size() { return here->block->launch.grid; }

Meeting& next_meeting() { return here->warp->meeting[here->warp->meetings & 1]; }

void meet_warp(const char* what, void (*last)(Meeting&)) {
  Fiber& f = self();
  Warp& warp = *f.warp;
  if (warp.waiting == 0) warp.what = what;
  if (warp.what != what && std::strcmp(warp.what, what) != 0)
    throw std::logic_error(std::string("emulator: lanes of a warp meet at ") + warp.what + " and at " + what);
  warp.waiting |= 1u << f.lane;
  if (warp.waiting == ~0u) {
    if (last) last(next_meeting());
    warp.ready |= std::exchange(warp.waiting, 0) & ~(1u << f.lane);
    ++warp.meetings;
  } else {
    leave(f);
  }
}

bool meet_block(bool bring) {
  Fiber& f = self();
  Block& block = *f.block;
  block.any = block.any || bring;
  block.at_barrier[static_cast<std::size_t>(f.index.x / lanes)] |= 1u << f.lane;
  if (++block.arrived == block.alive) block.open_barrier();
  leave(f);
  return block.any_before;
}

char* launch_memory() { return here->block->processor.shared(); }

std::uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const char*>(p) - launch_memory();
  if (offset >= 0 && offset <= static_cast<std::ptrdiff_t>(here->block->launch.shared_bytes))
    return static_cast<std::uint32_t>(offset);
  const auto apart = static_cast<const char*>(p) - declared;
  if (apart < -(1 << 24) || apart > 1 << 24) throw std::logic_error("emulator: not an address in shared memory");
  return declared_address + static_cast<std::uint32_t>(apart);
}

char* at_shared(std::uint32_t address, std::size_t bytes) {
  if (address >= declared_address - (1u << 24)) return declared + static_cast<std::int32_t>(address - declared_address);
  if (address + bytes > here->block->launch.shared_bytes || address % bytes != 0)
    throw std::logic_error("emulator: " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of " +
                           std::to_string(here->block->launch.shared_bytes) + " of shared memory");
  return launch_memory() + address;
}

void start_copy(std::uint32_t to, const void* from, std::size_t bytes) {
  Fiber& f = self();
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) throw std::logic_error("emulator: a copy is not aligned");
  const Copy copy{to, from, bytes, f.open_group};
  if (f.block->draw() >> 10 & 1)
    land(copy);
  else
    f.copies.push_back(copy);
}

void close_copies() { ++self().open_group; }

void await_copies(unsigned pending) {
  Fiber& f = self();
  while (!f.copies.empty() && f.copies.front().group + pending < f.open_group) {
    land(f.copies.front());
    f.copies.pop_front();
  }
}

/// Others go first.
static void pass(Fiber& f) {
  if (++f.block->passes > most_passes) throw std::logic_error("emulator: all wait for a barrier");
  f.warp->ready |= 1u << f.lane;
  leave(f);
}

/// The barrier's arrivals for a phase, and above them the bytes that are missing in the present one; the arrivals that are, and
/// its parity.
constexpr int arrival_bits = 12;
static std::uint32_t* words_of(std::uint32_t barrier) {
  return reinterpret_cast<std::uint32_t*>(at_shared(barrier, 8));
}
static void end_phase(std::uint32_t* words) {
  if (words[1] >> 1 == 0 && words[0] >> arrival_bits == 0) words[1] = words[0] << 1 | (~words[1] & 1);
}
void barrier_init(std::uint32_t barrier, int arrivals) {
  std::uint32_t* words = words_of(barrier);
  words[0] = static_cast<std::uint32_t>(arrivals), words[1] = words[0] << 1;
}
void barrier_arrive(std::uint32_t barrier, unsigned expected_bytes) {
  std::uint32_t* words = words_of(barrier);
  here->block->passes = 0;
  words[0] += expected_bytes << arrival_bits, words[1] -= 2;
  end_phase(words);
}

static void land(const Box& box) {
  for (int r = 0; r < box.from->tile; ++r)
    for (int c = 0; c < box_channels; ++c) {
      const std::uint16_t element = element_of_box(*box.from, box.channel + c, box.row + r, box.unit);
      const auto at = box.to + static_cast<std::uint32_t>(r * 128 + c * 2);
      std::memcpy(at_shared(at ^ (at >> 7 & 7) << 4, 2), &element, 2);
    }
  std::uint32_t* words = words_of(box.barrier);
  words[0] -= static_cast<std::uint32_t>(box.from->tile * box_channels * 2) << arrival_bits;
  end_phase(words);
}
void start_box(std::uint32_t to, const TileMap& from, int channel, int row, int unit, std::uint32_t barrier) {
  if (to % 1024 != 0 || reinterpret_cast<std::uintptr_t>(from.first) % 16 != 0 || from.dim % 8 != 0)
    throw std::logic_error("emulator: a box is not aligned");
  const Box box{to, &from, channel, row, unit, barrier};
  Block& block = *here->block;
  if (block.draw() >> 10 & 1)
    land(box);
  else
    block.boxes.push_back(box);
}

bool barrier_passed(std::uint32_t barrier, int parity) { return static_cast<int>(words_of(barrier)[1] & 1) != parity; }
void barrier_wait(std::uint32_t barrier, int parity) {
  while (!barrier_passed(barrier, parity)) {
    std::vector<Box>& boxes = here->block->boxes;
    const auto landing = std::ranges::find(boxes, barrier, &Box::barrier);
    if (landing == boxes.end()) {
      pass(self());
      continue;
    }
    const Box box = *landing;
    boxes.erase(landing);
    land(box);
  }
}

void named_arrive(int id, int threads) {
  auto& barrier = here->block->named[id];
  here->block->passes = 0;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.passed;
}
void named_wait(int id, int threads) {
  const auto& barrier = here->block->named[id];
  const unsigned passed = barrier.passed;
  named_arrive(id, threads);
  while (barrier.passed == passed) pass(self());
}

void tell_others() { ++here->block->launch.told; }
void wait_a_moment() {
  Block& block = *here->block;
  if (block.launch.failed) throw std::runtime_error("emulator: another block failed");
  if (const unsigned told = block.launch.told; told != block.told_before) block.told_before = told, block.moments = 0;
  if (++block.moments > most_moments) throw std::logic_error("emulator: all wait for another block");
  std::this_thread::yield();
}

void draw_by(unsigned seed) { drawn_by = seed; }

void run(Index grid, int threads, std::size_t shared_bytes, bool together, const std::function<void()>& kernel) {
  if (shared_bytes > shared_most) throw std::logic_error("emulator: more shared memory than a block can have");
  Launched launched{grid, {static_cast<unsigned>(threads), 1, 1}, shared_bytes, &kernel};
  const unsigned blocks = grid.x * grid.y;
  std::atomic<unsigned> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    std::unique_ptr<Processor> processor = processors().take();
    for (unsigned b = next++; b < blocks && !launched.failed; b = next++) {
      try {
        Block(launched, {b % grid.x, b / grid.x, 0}, *processor).run();
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!launched.failed.exchange(true)) error = std::current_exception();
      }
    }
    processors().give(std::move(processor));
  };
  const unsigned workers = together ? blocks : std::min(blocks, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (unsigned w = 1; w < workers; ++w) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace kv::emulator
