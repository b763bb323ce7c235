// A GPU for one host thread: grids of clusters of CTAs whose threads are fibers, run in a random order from a seed.
//
// A fiber runs until it blocks, ends, or is preempted at a call of ptx.h. Asynchronous copies land at random later
// moments. The first rule that a kernel breaks ends the run with a message that names the thread and the place; so does
// a state in which nobody can go on. ptx.h says what is checked; memory.cpp sees every load and store.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "knowledge.h"

namespace fuseline::emulator {

constexpr uint32_t kSharedBase = 0x400;
constexpr uint32_t kRankShift = 24;
constexpr size_t kStackBytes = 96 << 10;
constexpr uint32_t kNobody = 0xffffffffu;  // has written: reading is an error
constexpr uint32_t kHost = 0xfffffffeu;    // wrote it before the run: ordered before everything
constexpr uint32_t kBarrier = 0xfffffffdu; // the bytes of an mbarrier: not for loads and stores

// Two bytes of memory: who wrote them last, and who has read them since.
struct Cell {
    uint32_t writer = kNobody, written_at = 0;
    uint32_t reader = kNobody, read_at = 0; // or, if several have, an index into Memory's lists
    uint32_t writer_place = 0;
    bool several = false;
};

struct Region {
    std::string name;
    uint8_t* base = nullptr;
    size_t bytes = 0;
    bool writable = true;
    std::vector<Cell> cells; // none if not writable
    std::vector<std::vector<std::pair<uint32_t, uint32_t>>> readers;
};

struct Cta;
struct Thread;

struct Mbarrier {
    uint32_t expected, pending;
    int64_t bytes = 0; // still to come; negative if copies landed before they were announced
    uint32_t phase = 0;
    uint32_t copied_in = 0; // the last phase, counted from 1, in which a copy landed
    uint32_t actor;
    uint32_t init_actor, init_step;
    bool fenced = false;          // by fence_mbarrier_init
    uint32_t fenced_in_phase = 0; // of the cluster barrier: known to peers from the next on
    Merged arriving;
    Knowledge done;
    std::vector<Thread*> waiters;
};

struct NamedBarrier {
    uint32_t threads = 0, arrived = 0;
    Merged arriving;
    std::vector<Thread*> waiters;
};

struct Warp {
    Cta* cta;
    uint32_t index = 0;
    uint32_t ready = 0; // lanes that can run
    size_t place = 0;   // in the list of warps that can
    double priority = 0;
    const char* together = nullptr; // the collective that lanes wait in
    uint32_t lanes = 0;
    void* arguments[32];
};

// What a blocked thread waits for, put into words only if nobody can go on.
struct Wait {
    const char* what;
    uint32_t offset, value;
};

struct Thread {
    Cta* cta;
    Warp* warp;
    uint32_t index, actor;
    void* stack_pointer = nullptr;
    uint8_t* stack = nullptr;
    Knowledge known;
    uint32_t clock = 1, fenced[kKinds] = {};
    bool cluster_arrived = false, ended = false;
    uint32_t cluster_phase = 0; // that it has waited for
    Wait wait = {};

    Stamp stamp() const { return {known, actor, {clock, fenced[kSharedFenced], fenced[kGlobalFenced]}}; }
};

struct Cluster {
    uint32_t arrived = 0, phase = 0;
    Merged arriving;
    Knowledge done;
    std::vector<Thread*> waiters;
    std::vector<Cta*> ctas;
};

struct Grid;
struct Cta {
    Grid* grid;
    Cluster* cluster;
    uint32_t index, rank, running;
    bool triggered = false;
    std::vector<uint8_t> storage;
    Region shared;
    std::deque<Warp> warps;
    std::deque<Thread> threads;
    std::map<uint32_t, Mbarrier> barriers;           // by offset
    std::vector<std::pair<uint32_t, uint32_t>> sent; // its copies to peers that have landed: actor and step
    NamedBarrier named[16];
};

struct Launch {
    std::string name;
    std::function<void()> body;
    uint32_t clusters, cluster, threads, shared_bytes;
    bool dependent;
};

struct Grid {
    Launch launch;
    uint32_t actor_base = 0, started = 0, ended = 0; // CTAs
    bool begun = false;
    Knowledge done;
    std::deque<Cluster> clusters;
    std::deque<Cta> ctas;
    Merged finishing;
    std::vector<Thread*> waiters; // in grid_wait
};

// A copy in flight.
struct Copy {
    Cta* target;
    uint32_t target_offset, bytes;
    Cta* source_cta; // or null: from `source`, global memory, or from `value`
    uint32_t source_offset;
    const uint8_t* source;
    uint8_t value[16];
    uint32_t barrier_offset;
    Stamp stamp;
    uint32_t place;
};

struct SyncWord {
    Knowledge released;
    std::vector<Thread*> waiters;
};

class Machine {
  public:
    static Machine& instance();

    // Forgets queued launches and buffers; the seed draws the order of everything.
    void reset(uint64_t seed, uint32_t max_resident);
    void add_buffer(const std::string& name, void* base, size_t bytes, bool writable, bool written);
    void enqueue(Launch launch) { queue_.push_back(std::move(launch)); }
    // Runs what is queued; false with error() set if a rule was broken.
    bool run();
    const std::string& error() const { return error_; }
    uint64_t steps() const { return steps_; }

    // For threads, from here on.
    [[noreturn]] void fail(const std::string& what);
    void block(const Wait& wait);
    void wake(Thread* thread);
    void wake_all(std::vector<Thread*>& waiters);
    void maybe_preempt();
    void end_thread();
    void start_copy(Copy copy);
    void wait_for_grids_before();
    uint32_t new_copies_actor(const Cta& cta, uint32_t offset);
    bool is_copies(uint32_t actor) const { return copies_actors_.count(actor) != 0; }
    std::string describe(const Thread& thread) const;
    std::string describe_actor(uint32_t actor) const;
    Region* find_buffer(const void* address, size_t bytes);
    SyncWord& sync_word(const void* address) { return sync_words_[address]; }

  private:
    void start_grids();
    bool may_begin(size_t index) const;
    void begin(Grid& grid);
    void start_cluster(Grid& grid);
    void release(Grid& grid);
    void land_copy();
    void check_cta_end(Cta& cta);
    void require_known(const Cta& cta, uint32_t actor, uint32_t step, const std::string& what);
    Thread* pick();
    bool step();
    std::string deadlock() const;
    void clean_up();
    uint32_t random(uint32_t below) { return static_cast<uint32_t>(generator_() % below); }

    std::mt19937_64 generator_;
    uint32_t policy_ = 0, land_one_in_ = 8, preempt_one_in_ = 0, max_resident_ = 0, resident_ = 0;
    std::vector<Warp*> ready_;
    Warp* last_ = nullptr;
    std::vector<Copy> copies_;
    std::vector<std::unique_ptr<Region>> buffers_;
    std::unordered_map<const void*, SyncWord> sync_words_;
    std::vector<Launch> queue_;
    std::deque<Grid> grids_;
    uint32_t actors_ = 0;
    std::unordered_map<uint32_t, std::string> copies_actors_;
    std::vector<uint8_t*> free_stacks_;
    std::string error_;
    uint64_t steps_ = 0;
};

extern Thread* current;

// memory.cpp. A place is an offset into this library, for addr2line.
uint32_t place_of(const void* return_address);
void access_shared(Cta& cta, uint32_t offset, uint32_t bytes, bool write, const char* what, uint32_t place);
void access_global(const void* address, size_t bytes, bool write, const char* what, uint32_t place);
void land_read(Region& region, size_t offset, const Copy& copy, uint32_t actor, uint32_t step, Kind fence);
void land_write(Region& region, size_t offset, const Copy& copy, uint32_t actor, uint32_t step);
void forget(Region& region);

// sync.cpp
Cta& cta_of(uint32_t address, uint32_t& offset);
Mbarrier& barrier_at(Cta& cta, uint32_t offset, const char* what);
void complete_bytes(Cta& cta, uint32_t offset, const Copy& copy);

} // namespace fuseline::emulator
