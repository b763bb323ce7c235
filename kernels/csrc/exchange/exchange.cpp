// See exchange.h.
#include "exchange.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "../cpu/isa.h"

namespace {

constexpr int32_t kMaxRanks = 16;
constexpr int64_t kSlotBytes = 128 << 10; // a decode step's sums fit into one turn, and two slots into a core's cache
constexpr int64_t kMailboxBytes = 64 << 10;
constexpr int64_t kShareBytes = 16 << 10; // from here on, more than two ranks reduce a share each
constexpr int64_t kSliceNs = 10'000'000;  // a sleeper looks around so often
constexpr int kSpinsPerYield = 32;        // one or two microseconds
constexpr int64_t kBusyYieldNs = 5'000;   // a yield that took longer let another thread run
constexpr int64_t kMaxElements = int64_t(1) << 40;

// A count that only grows (modulo 2^32) and that others wait for. Alone on its cache lines (two are fetched at once).
struct alignas(128) Event {
    std::atomic<uint32_t> count;
    std::atomic<uint32_t> sleepers;
};

struct Member {
    Event published;
    alignas(128) std::atomic<uint32_t> left;
};

struct Channel {
    Event sent, taken;
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared between processes");

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Shared futexes: the ranks may be threads of one process or processes of one machine.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t at_most_ns) {
    const timespec span{time_t(at_most_ns / 1'000'000'000), long(at_most_ns % 1'000'000'000)};
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &span, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Announce the next count. A sleeper counts itself before it looks at the count for the last time, and both sides are
// sequentially consistent: either it sees the new count, or its being there is seen here.
void advance(Event& event) {
    event.count.fetch_add(1, std::memory_order_seq_cst);
    if (event.sleepers.load(std::memory_order_seq_cst) != 0)
        futex_wake(event.count);
}

bool reached(uint32_t count, uint32_t target) {
    return int32_t(count - target) >= 0;
}

int64_t num_pairs(int64_t world) {
    return world * (world - 1);
}

struct Exchange {
    int32_t rank, world;
    int64_t spin_ns, timeout_ns;
    int32_t pidfds[kMaxRanks];
    Member* members;
    Channel* channels;
    char *slots, *mailboxes;
    uint32_t published = 0;          // by this rank, and by every other that has come as far
    uint32_t turn = 0;               // chooses between the two slots
    uint32_t turn_first[2] = {0, 0}; // what publishing a turn first made of the count, of the last two turns
    uint32_t sent[kMaxRanks] = {}, taken[kMaxRanks] = {}; // by this rank, to and from each other one

    char* slot(int32_t of) const { return slots + (2 * of + (turn & 1)) * kSlotBytes; }

    int64_t pair(int32_t src, int32_t dst) const { return int64_t(src) * (world - 1) + (dst > src ? dst - 1 : dst); }

    char* mailbox(int64_t pair, uint32_t number) const { return mailboxes + (2 * pair + (number & 1)) * kMailboxBytes; }

    bool is_closed() const { return members[rank].left.load(std::memory_order_acquire) != 0; }

    void close() {
        members[rank].left.store(1, std::memory_order_seq_cst);
        futex_wake(members[rank].published.count);
        for (int32_t peer = 0; peer < world; ++peer)
            if (peer != rank) {
                futex_wake(channels[pair(rank, peer)].sent.count);
                futex_wake(channels[pair(peer, rank)].taken.count);
            }
    }

    int32_t fail(int32_t peer, fl_shm_reason reason) {
        close();
        return peer << 8 | reason;
    }

    // What keeps `peer` from ever coming; 0 when nothing does.
    fl_shm_reason obstacle(int32_t peer, int64_t deadline_ns) const {
        if (is_closed())
            return FL_SHM_CLOSED;
        if (members[peer].left.load(std::memory_order_acquire) != 0)
            return FL_SHM_LEFT;
        pollfd process{pidfds[peer], POLLIN, 0};
        if (process.fd >= 0 && poll(&process, 1, 0) == 1 && (process.revents & POLLIN))
            return FL_SHM_DIED;
        return now_ns() >= deadline_ns ? FL_SHM_TIMED_OUT : FL_SHM_OK;
    }

    // Wait until an event that `peer` brings about has come to `target`.
    int32_t wait(Event& event, uint32_t target, int32_t peer) {
        if (reached(event.count.load(std::memory_order_acquire), target))
            return FL_SHM_OK;
        const int64_t started_ns = now_ns();
        for (int64_t now = started_ns; now - started_ns < spin_ns;) {
            for (int i = 0; i < kSpinsPerYield; ++i) {
                relax();
                if (reached(event.count.load(std::memory_order_acquire), target))
                    return FL_SHM_OK;
            }
            // Spinning is for idle cores: if somebody else wants this one, it may be the peer, and sleeping pays.
            const int64_t before = now_ns();
            sched_yield();
            now = now_ns();
            if (reached(event.count.load(std::memory_order_acquire), target))
                return FL_SHM_OK;
            if (now - before > kBusyYieldNs)
                break;
        }
        for (;;) {
            event.sleepers.fetch_add(1, std::memory_order_seq_cst);
            const uint32_t seen = event.count.load(std::memory_order_seq_cst);
            if (!reached(seen, target))
                futex_wait(event.count, seen, std::min(kSliceNs, timeout_ns));
            event.sleepers.fetch_sub(1, std::memory_order_relaxed);
            if (reached(event.count.load(std::memory_order_acquire), target))
                return FL_SHM_OK;
            if (const fl_shm_reason reason = obstacle(peer, started_ns + timeout_ns))
                // It may have come, and left, since the last look.
                return reached(event.count.load(std::memory_order_acquire), target) ? FL_SHM_OK : fail(peer, reason);
        }
    }

    int32_t wait_for_all(uint32_t target) {
        for (int32_t peer = 0; peer < world; ++peer)
            if (peer != rank)
                if (const int32_t failure = wait(members[peer].published, target, peer))
                    return failure;
        return FL_SHM_OK;
    }

    // Begin a turn: the other slot, which every rank has read when all have published the turn between.
    int32_t begin_turn() {
        ++turn;
        return wait_for_all(turn_first[(turn - 1) & 1]);
    }

    void publish_turn() {
        publish();
        turn_first[turn & 1] = published;
    }

    void publish() {
        advance(members[rank].published);
        ++published;
    }
};

using fuseline::bf16;
using fuseline::f16;
using fuseline::widen;

double widen(double x) {
    return x;
}
// Integers wrap around.
uint32_t widen(uint32_t x) {
    return x;
}
uint64_t widen(uint64_t x) {
    return x;
}

// To the nearest, ties to even, as torch rounds.
void narrow(float value, bf16& out) {
    out.bits = fuseline::to_bf16_bits(value);
}

void narrow(float value, f16& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00; // NaN
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00; // 65520 and more round to infinity
    } else if (magnitude < 0x38800000) {
        // Below 2^-14: adding 0.5 makes the addition itself round to multiples of 2^-24, the spacing there.
        const float shifted = std::fabs(value) + 0.5f;
        std::memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000;
    } else {
        half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    }
    out.bits = uint16_t(half | sign);
}

template <class T>
void narrow(T value, T& out) {
    out = value;
}

// out[i] = parts[0][i] + parts[1][i] + ..., one after the other; out may be one of the parts.
template <class T>
void add_in_order(T* out, const T* const* parts, int32_t num_parts, int64_t n) {
    using Sum = decltype(widen(T()));
    constexpr int64_t kBlock = 512;
    Sum total[kBlock];
    for (int64_t at = 0; at < n; at += kBlock) {
        const int64_t count = std::min(kBlock, n - at);
        for (int64_t i = 0; i < count; ++i)
            total[i] = widen(parts[0][at + i]);
        for (int32_t part = 1; part < num_parts; ++part)
            for (int64_t i = 0; i < count; ++i)
                total[i] += widen(parts[part][at + i]);
        for (int64_t i = 0; i < count; ++i)
            narrow(total[i], out[at + i]);
    }
}

// This turn's slots are published by all: leave the sum of elements [begin, end) of all of them at `out`.
template <class T>
void sum_slots(const Exchange& x, T* out, int64_t begin, int64_t end) {
    const T* parts[kMaxRanks];
    for (int32_t rank = 0; rank < x.world; ++rank)
        parts[rank] = reinterpret_cast<const T*>(x.slot(rank)) + begin;
    add_in_order(out, parts, x.world, end - begin);
}

template <class T>
int32_t reduce(Exchange& x, T* data, int64_t n) {
    constexpr int64_t kMost = kSlotBytes / int64_t(sizeof(T));
    for (int64_t at = 0; at < n; at += kMost) {
        const int64_t count = std::min(kMost, n - at);
        if (const int32_t failure = x.begin_turn())
            return failure;
        T* mine = reinterpret_cast<T*>(x.slot(x.rank));
        std::memcpy(mine, data + at, count * sizeof(T));
        x.publish_turn();
        if (const int32_t failure = x.wait_for_all(x.published))
            return failure;
        if (x.world == 2 || count * int64_t(sizeof(T)) < kShareBytes) {
            sum_slots(x, data + at, 0, count);
            continue;
        }
        // Each rank sums its share into its own slot, where nobody else reads that share of the parts.
        const auto bound = [&](int32_t rank) { return count * rank / x.world; };
        sum_slots(x, mine + bound(x.rank), bound(x.rank), bound(x.rank + 1));
        x.publish();
        if (const int32_t failure = x.wait_for_all(x.published))
            return failure;
        for (int32_t rank = 0; rank < x.world; ++rank)
            std::memcpy(data + at + bound(rank), reinterpret_cast<const T*>(x.slot(rank)) + bound(rank),
                        (bound(rank + 1) - bound(rank)) * sizeof(T));
    }
    return FL_SHM_OK;
}

// The handle if it is open and the arguments make sense; otherwise null, with the reason in `failure`.
Exchange* open_handle(void* handle, bool sensible, int32_t& failure) {
    auto* x = static_cast<Exchange*>(handle);
    if (x == nullptr || !sensible)
        failure = FL_SHM_REFUSED;
    else if (x->is_closed())
        failure = x->rank << 8 | FL_SHM_CLOSED;
    else
        return x;
    return nullptr;
}

bool is_size(int64_t n) {
    return n >= 0 && n <= kMaxElements;
}

} // namespace

int64_t fl_shm_bytes(int32_t world) {
    if (world < 2 || world > kMaxRanks)
        return 0;
    return world * int64_t(sizeof(Member) + 2 * kSlotBytes) +
           num_pairs(world) * int64_t(sizeof(Channel) + 2 * kMailboxBytes);
}

void* fl_shm_create(void* base, int32_t rank, int32_t world, const int32_t* pidfds, int64_t spin_ns,
                    int64_t timeout_ns) {
    if (base == nullptr || pidfds == nullptr || fl_shm_bytes(world) == 0 || rank < 0 || rank >= world ||
        timeout_ns <= 0 || reinterpret_cast<uintptr_t>(base) % alignof(Event) != 0)
        return nullptr;
    auto* x = new (std::nothrow) Exchange;
    if (x == nullptr)
        return nullptr;
    x->rank = rank;
    x->world = world;
    x->spin_ns = spin_ns;
    x->timeout_ns = timeout_ns;
    std::copy(pidfds, pidfds + world, x->pidfds);
    // A zeroed mapping is an array of these: atomics of integers with nothing to construct.
    x->members = static_cast<Member*>(base);
    x->channels = reinterpret_cast<Channel*>(x->members + world);
    x->slots = reinterpret_cast<char*>(x->channels + num_pairs(world));
    x->mailboxes = x->slots + world * 2 * kSlotBytes;
    return x;
}

void fl_shm_close(void* handle) {
    if (handle != nullptr)
        static_cast<Exchange*>(handle)->close();
}

void fl_shm_destroy(void* handle) {
    fl_shm_close(handle);
    delete static_cast<Exchange*>(handle);
}

int32_t fl_shm_all_reduce(void* handle, float* data, int64_t n) {
    return fl_shm_reduce(handle, data, n, FL_SHM_F32);
}

int32_t fl_shm_reduce(void* handle, void* data, int64_t n, int32_t dtype) {
    int32_t failure = FL_SHM_OK;
    Exchange* x = open_handle(handle, is_size(n) && (data != nullptr || n == 0), failure);
    if (x == nullptr)
        return failure;
    switch (dtype) {
    case FL_SHM_F32:
        return reduce(*x, static_cast<float*>(data), n);
    case FL_SHM_BF16:
        return reduce(*x, static_cast<bf16*>(data), n);
    case FL_SHM_F16:
        return reduce(*x, static_cast<f16*>(data), n);
    case FL_SHM_F64:
        return reduce(*x, static_cast<double*>(data), n);
    case FL_SHM_I32:
        return reduce(*x, static_cast<uint32_t*>(data), n);
    case FL_SHM_I64:
        return reduce(*x, static_cast<uint64_t*>(data), n);
    default:
        return FL_SHM_REFUSED;
    }
}

int32_t fl_shm_all_gather(void* handle, const void* in, void* out, int64_t nbytes) {
    int32_t failure = FL_SHM_OK;
    Exchange* x = open_handle(handle, is_size(nbytes) && (nbytes == 0 || (in && out)), failure);
    if (x == nullptr)
        return failure;
    for (int64_t at = 0; at < nbytes; at += kSlotBytes) {
        const int64_t count = std::min(kSlotBytes, nbytes - at);
        if ((failure = x->begin_turn()))
            return failure;
        std::memcpy(x->slot(x->rank), static_cast<const char*>(in) + at, count);
        x->publish_turn();
        if ((failure = x->wait_for_all(x->published)))
            return failure;
        for (int32_t rank = 0; rank < x->world; ++rank)
            std::memcpy(static_cast<char*>(out) + rank * nbytes + at, x->slot(rank), count);
    }
    return FL_SHM_OK;
}

int32_t fl_shm_broadcast(void* handle, void* data, int64_t nbytes, int32_t src) {
    int32_t failure = FL_SHM_OK;
    Exchange* x = open_handle(handle, is_size(nbytes) && (nbytes == 0 || data), failure);
    if (x == nullptr)
        return failure;
    if (src < 0 || src >= x->world)
        return FL_SHM_REFUSED;
    for (int64_t at = 0; at < nbytes; at += kSlotBytes) {
        const int64_t count = std::min(kSlotBytes, nbytes - at);
        if ((failure = x->begin_turn()))
            return failure;
        if (x->rank == src)
            std::memcpy(x->slot(src), static_cast<const char*>(data) + at, count);
        x->publish_turn();
        if (x->rank == src)
            continue;
        if ((failure = x->wait(x->members[src].published, x->published, src)))
            return failure;
        std::memcpy(static_cast<char*>(data) + at, x->slot(src), count);
    }
    return FL_SHM_OK;
}

int32_t fl_shm_barrier(void* handle) {
    int32_t failure = FL_SHM_OK;
    Exchange* x = open_handle(handle, true, failure);
    if (x == nullptr)
        return failure;
    x->publish();
    return x->wait_for_all(x->published);
}

int32_t fl_shm_send(void* handle, const void* data, int64_t nbytes, int32_t dst) {
    int32_t failure = FL_SHM_OK;
    Exchange* x = open_handle(handle, is_size(nbytes) && (nbytes == 0 || data), failure);
    if (x == nullptr)
        return failure;
    if (dst < 0 || dst >= x->world || dst == x->rank)
        return FL_SHM_REFUSED;
    const int64_t pair = x->pair(x->rank, dst);
    for (int64_t at = 0; at < nbytes; at += kMailboxBytes) {
        // The mailbox holds two messages: this one goes where the last but one was.
        if ((failure = x->wait(x->channels[pair].taken, x->sent[dst] - 1, dst)))
            return failure;
        std::memcpy(x->mailbox(pair, x->sent[dst]), static_cast<const char*>(data) + at,
                    std::min(kMailboxBytes, nbytes - at));
        advance(x->channels[pair].sent);
        ++x->sent[dst];
    }
    return FL_SHM_OK;
}

int32_t fl_shm_recv(void* handle, void* data, int64_t nbytes, int32_t src) {
    int32_t failure = FL_SHM_OK;
    Exchange* x = open_handle(handle, is_size(nbytes) && (nbytes == 0 || data), failure);
    if (x == nullptr)
        return failure;
    if (src < 0 || src >= x->world || src == x->rank)
        return FL_SHM_REFUSED;
    const int64_t pair = x->pair(src, x->rank);
    for (int64_t at = 0; at < nbytes; at += kMailboxBytes) {
        if ((failure = x->wait(x->channels[pair].sent, x->taken[src] + 1, src)))
            return failure;
        std::memcpy(static_cast<char*>(data) + at, x->mailbox(pair, x->taken[src]),
                    std::min(kMailboxBytes, nbytes - at));
        advance(x->channels[pair].taken);
        ++x->taken[src];
    }
    return FL_SHM_OK;
}
