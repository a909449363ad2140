#include "twin.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace twin {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kOffsetBits = 20;
constexpr long long kEnoughTurns = 40'000'000;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  void perform() const {
    if (from) std::memcpy(to, from, bytes);
    else std::memset(to, 0, bytes);
  }
};

// A store on its way: a word of a thread's, or a whole vector that a barrier counts.
struct Late {
  int owner;
  char* to;
  std::array<char, 16> data;
  size_t bytes;
  void* barrier;
};

struct Thread : Fiber {
  int number;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
  const uint64_t* waits_for = nullptr;  // to be something else than `seen`
  uint64_t seen = 0;
  std::deque<std::vector<Copy>> copies{1};  // groups, the last one open
};

struct Meeting {
  int arrived = 0, members = 0;  // members that have not left
  uint64_t generation = 0;
};

struct Warp : Meeting {
  std::array<Given, 2> given;
};

struct Barrier {
  int arrivals, pending;
  long long bytes = 0;
  int phase = 0;
  void settle() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

std::mt19937_64 random_numbers;
Mutation chosen = kNone;

struct Machine {
  Grid grid;
  const std::function<void()>* kernel;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Meeting> blocks, clusters;
  std::vector<std::vector<char>> shared;
  std::vector<Late> late;
  std::map<void*, Barrier> barriers;
  ucontext_t scheduler;
  Thread* now = nullptr;
  long long turns = 0;
  std::exception_ptr problem;
};
Machine* machine = nullptr;

uint64_t draw(uint64_t below) { return random_numbers() % below; }

void arrive(Meeting& meeting) {
  if (++meeting.arrived < meeting.members) {
    machine->now->waits_for = &meeting.generation;
    machine->now->seen = meeting.generation;
    yield();
    machine->now->waits_for = nullptr;
    return;
  }
  meeting.arrived = 0;
  ++meeting.generation;
}

void leave(Meeting& meeting) {
  if (--meeting.members > 0 && meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}

void deliver(size_t index) {
  // One thread's stores to one address keep their order.
  for (size_t i = 0; i < index; ++i) {
    if (machine->late[i].owner == machine->late[index].owner && machine->late[i].to == machine->late[index].to) {
      index = i;
    }
  }
  const Late store = machine->late[index];
  machine->late.erase(machine->late.begin() + static_cast<ptrdiff_t>(index));
  std::memcpy(store.to, store.data.data(), store.bytes);
  if (store.barrier) {
    Barrier& barrier = machine->barriers.at(store.barrier);
    barrier.bytes -= static_cast<long long>(store.bytes);
    barrier.settle();
  }
}

// A word of ones says "not there yet": nobody waits for it, so it may take as long as a fence lets it.
bool takes_its_time(const Late& store) {
  return !store.barrier && std::all_of(store.data.begin(), store.data.begin() + 4, [](char c) { return c == '\xff'; });
}

void enter() {
  Thread& self = *machine->now;
  try {
    (*machine->kernel)();
  } catch (...) {
    machine->problem = std::current_exception();
  }
  self.finished = true;
  leave(machine->warps[self.number / 32]);
  leave(machine->blocks[self.block]);
  leave(machine->clusters[self.block / machine->grid.cluster]);
  swapcontext(&self.context, &machine->scheduler);
}

}  // namespace

void seed(uint64_t number, Mutation mutation) {
  random_numbers.seed(number);
  chosen = mutation;
}

Mutation mutation() { return chosen; }
const Grid& grid() { return machine->grid; }
const Fiber& current() { return *machine->now; }
long long time() { return machine->turns; }

void yield() {
  Thread& self = *machine->now;
  swapcontext(&self.context, &machine->scheduler);
}

void run(int blocks, int threads, int cluster, int shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes >= 1 << kOffsetBits || threads % 32 != 0 || blocks % cluster != 0) {
    throw std::runtime_error("no such grid");
  }
  Machine here{};
  machine = &here;
  here.grid = {blocks, threads, cluster};
  here.kernel = &kernel;
  here.warps.resize(static_cast<size_t>(blocks) * threads / 32);
  here.blocks.resize(blocks);
  here.clusters.resize(blocks / cluster);
  for (Meeting& warp : here.warps) warp.members = 32;
  for (Meeting& block : here.blocks) block.members = threads;
  for (Meeting& group : here.clusters) group.members = threads * cluster;
  // What a kernel does not write holds what looks like numbers and is none.
  here.shared.assign(blocks, std::vector<char>(shared_bytes + 16, static_cast<char>(0x7f)));
  for (int number = 0; number < blocks * threads; ++number) {
    auto thread = std::make_unique<Thread>();
    thread->thread = number % threads;
    thread->block = number / threads;
    thread->number = number;
    thread->stack.reset(new char[kStack]);
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.get();
    thread->context.uc_stack.ss_size = kStack;
    thread->context.uc_link = &here.scheduler;
    makecontext(&thread->context, enter, 0);
    here.threads.push_back(std::move(thread));
  }
  std::vector<int> alive(here.warps.size());
  for (size_t i = 0; i < alive.size(); ++i) alive[i] = static_cast<int>(i);
  // Stores are quick in one run, slow in another.
  const uint64_t slowness = 1 + draw(60);
  while (!alive.empty() && !here.problem && here.turns < kEnoughTurns) {
    ++here.turns;
    if (!here.late.empty() && draw(slowness) == 0) {
      for (uint64_t count = 1 + here.late.size() / 2; count > 0 && !here.late.empty(); --count) {
        const size_t index = draw(here.late.size());
        if (!takes_its_time(here.late[index])) deliver(index);
      }
    }
    const size_t turn = draw(alive.size());
    const int warp = alive[turn];
    bool over = true;
    for (int lane = 0; lane < 32; ++lane) {
      Thread& thread = *here.threads[static_cast<size_t>(warp) * 32 + lane];
      if (thread.finished) continue;
      over = false;
      if (thread.waits_for && *thread.waits_for == thread.seen) continue;
      here.now = &thread;
      swapcontext(&here.scheduler, &thread.context);
    }
    if (over) alive.erase(alive.begin() + static_cast<ptrdiff_t>(turn));
  }
  while (!here.late.empty()) deliver(0);
  machine = nullptr;
  if (here.problem) std::rethrow_exception(here.problem);
  if (!alive.empty()) throw std::runtime_error("the kernel never ends");
}

const Given& meet(const void* mine, size_t bytes) {
  const Thread& self = *machine->now;
  Warp& warp = machine->warps[self.number / 32];
  Given& given = warp.given[warp.generation & 1];  // of two: a lane may be one meeting ahead
  if (bytes > sizeof given[0]) throw std::runtime_error("a lane gives too much");
  if (bytes > 0) std::memcpy(given[self.number % 32].data(), mine, bytes);
  arrive(warp);
  return given;
}

void sync_block() { arrive(machine->blocks[machine->now->block]); }
void sync_cluster() { arrive(machine->clusters[machine->now->block / machine->grid.cluster]); }

char* shared_of(int block) {
  char* const memory = machine->shared[block].data();
  return memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
}

uint32_t address_of(const void* shared) {
  const int block = machine->now->block;
  const ptrdiff_t offset = static_cast<const char*>(shared) - shared_of(block);
  return static_cast<uint32_t>(block) << kOffsetBits | static_cast<uint32_t>(offset);
}

void* at(uint32_t address, size_t bytes) {
  const int block = static_cast<int>(address >> kOffsetBits);
  const size_t offset = address & ((1u << kOffsetBits) - 1);
  if (block >= machine->grid.blocks || offset + bytes + 16 > machine->shared[block].size() || offset % bytes != 0) {
    throw std::runtime_error("shared memory: block " + std::to_string(block) + ", byte " + std::to_string(offset));
  }
  return shared_of(block) + offset;
}

uint32_t address_in(uint32_t address, int rank) {
  const uint32_t first = (address >> kOffsetBits) / machine->grid.cluster * machine->grid.cluster;
  return (first + rank) << kOffsetBits | (address & ((1u << kOffsetBits) - 1));
}

// Whether the stores of the running thread get lost.
bool is_mute() { return chosen == kMuteBlock && machine->now->block == 1; }

void store_late(char* to, const void* from, size_t bytes) {
  if (is_mute()) return;
  for (size_t i = 0; i < bytes; i += 4) {
    Late word{machine->now->number, to + i, {}, 4, nullptr};
    std::memcpy(word.data.data(), static_cast<const char*>(from) + i, 4);
    machine->late.push_back(word);
  }
}

void deliver_own() {
  const int self = machine->now->number;
  const auto own = [self](const Late& store) { return store.owner == self && !store.barrier; };
  for (auto it = std::find_if(machine->late.begin(), machine->late.end(), own); it != machine->late.end();
       it = std::find_if(machine->late.begin(), machine->late.end(), own)) {
    deliver(it - machine->late.begin());
  }
}

void copy_async(void* to, const void* from, size_t bytes) {
  const Copy copy{to, from, bytes};
  if (draw(2) == 0) copy.perform();
  else machine->now->copies.back().push_back(copy);
}

void commit_copies() { machine->now->copies.emplace_back(); }

void wait_copies(int pending) {
  auto& groups = machine->now->copies;
  while (groups.size() > static_cast<size_t>(pending) + 1) {
    for (const Copy& copy : groups.front()) copy.perform();
    groups.pop_front();
  }
}

void barrier_init(void* barrier, int arrivals) { machine->barriers[barrier] = {arrivals, arrivals}; }

void barrier_expect(void* barrier, int bytes) {
  Barrier& it = machine->barriers.at(barrier);
  it.bytes += bytes;
  --it.pending;
  it.settle();
}

bool barrier_done(void* barrier, int parity) { return (machine->barriers.at(barrier).phase & 1) != parity; }

void store_remote(uint32_t to, const void* from, size_t bytes, uint32_t barrier) {
  if (is_mute()) return;
  Late store{machine->now->number, static_cast<char*>(at(to, bytes)), {}, bytes, at(barrier, 8)};
  std::memcpy(store.data.data(), from, bytes);
  machine->late.push_back(store);
}

}  // namespace twin
