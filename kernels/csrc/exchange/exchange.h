// Ranks of one machine exchange tensors through one shared mapping: the data plane of the shared-memory communicator.
//
// The mapping is made once, zeroed, and mapped by every rank; it holds, for n ranks,
//
//     Member[n]                      what each rank has published, and whether it has left
//     Channel[n * (n - 1)]           what was sent and taken, for each ordered pair of ranks
//     slot[n][2][kSlotBytes]         what each rank contributes to a collective call: two turns, used alternately
//     mailbox[n * (n - 1)][2][kMailboxBytes]
//
// A collective call is a sequence of turns of at most kSlotBytes. In a turn a rank copies its part into its own slot,
// publishes, waits for the ranks whose parts it needs, and reads their slots. Whoever publishes turn t has done with
// reading turn t - 1; so a slot may be written again as soon as every rank has published the turn after its last use.
// Reductions add in rank order, element by element, whatever the size: all ranks compute the same bits.
//
// Waiting is spinning for a bounded time, or until another thread wants the core, and then sleeping on a futex in the
// mapping, in slices of a few milliseconds, between which a rank looks whether the one it waits for has left (a flag)
// or died (its pidfd) or is out of time.
//
// C ABI; nothing here throws. Every call returns 0, or (rank << 8 | reason): the rank that was waited for and an
// fl_shm_reason. After the first failure the handle is closed: this rank has left, and peers fail when they need it.
#pragma once

#include <stdint.h>

#pragma GCC visibility push(default)
extern "C" {

enum fl_shm_reason {
    FL_SHM_OK = 0,
    FL_SHM_CLOSED = 1,    // this rank had left before
    FL_SHM_LEFT = 2,      // the peer closed its handle
    FL_SHM_DIED = 3,      // the peer's process ended
    FL_SHM_TIMED_OUT = 4, // the peer did not come in time
    FL_SHM_REFUSED = 5,   // arguments out of range; nothing was done and the handle stays open
};

enum fl_shm_dtype { FL_SHM_F32 = 0, FL_SHM_BF16 = 1, FL_SHM_F16 = 2, FL_SHM_F64 = 3, FL_SHM_I32 = 4, FL_SHM_I64 = 5 };

// Bytes that the mapping of `world` ranks must have; 0 when world is out of range.
int64_t fl_shm_bytes(int32_t world);

// A rank's handle on the mapping at `base` (zeroed before the first rank comes; 128-byte aligned), or null.
// `pidfds[world]` refer to the ranks' processes, are borrowed until fl_shm_destroy, and -1 stands for one that is not
// to be watched. A wait spins for at most `spin_ns`, and lasts at most `timeout_ns`.
void* fl_shm_create(void* base, int32_t rank, int32_t world, const int32_t* pidfds, int64_t spin_ns,
                    int64_t timeout_ns);

// Leave: this rank's calls, even one under way in another thread, and those of ranks that wait for it, fail.
// Idempotent.
void fl_shm_close(void* handle);

// Close, and free the handle; no call may be under way. The mapping is the caller's.
void fl_shm_destroy(void* handle);

// Each of these is collective: every rank makes the same calls in the same order with the same sizes.
int32_t fl_shm_all_reduce(void* handle, float* data, int64_t n);                    // in place, in rank order
int32_t fl_shm_reduce(void* handle, void* data, int64_t n, int32_t dtype);          // 16-bit floats add in float32
int32_t fl_shm_all_gather(void* handle, const void* in, void* out, int64_t nbytes); // out[world][nbytes]
int32_t fl_shm_broadcast(void* handle, void* data, int64_t nbytes, int32_t src);
int32_t fl_shm_barrier(void* handle);

// Between two ranks: dst must receive what src sends, of the same size, in the same order.
int32_t fl_shm_send(void* handle, const void* data, int64_t nbytes, int32_t dst);
int32_t fl_shm_recv(void* handle, void* data, int64_t nbytes, int32_t src);
}
#pragma GCC visibility pop
