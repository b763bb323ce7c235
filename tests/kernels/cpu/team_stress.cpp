// A team under stress, as a program that a thread sanitizer can watch: every barrier must show every worker what all
// others wrote before it, whatever the size of the team, with regions from several threads at once, with teams resized
// between regions, and in a forked child. Arguments: workers, rounds. Exits 0 if all held.
#include <cstdio>
#include <cstdlib>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "team.h"

using namespace fuseline;

// Each round every worker writes its own cell and then reads all cells. Returns the number of wrong ones.
static int region(int rounds) {
    std::vector<int> cells(64, -1);
    std::atomic<int> wrong{0}, seen{0};
    Team::instance().run([&](const Worker& worker) {
        seen.fetch_add(1);
        for (int round = 0; round < rounds; ++round) {
            cells[worker.index] = round;
            worker.barrier();
            for (int index = 0; index < worker.count; ++index)
                wrong += cells[index] != round;
            worker.barrier();
        }
        if (worker.index == 0 && seen.load() != worker.count)
            wrong += rounds > 0;
    });
    return wrong;
}

static int shares(int workers) {
    int wrong = 0;
    for (int64_t n : {0, 1, 7, 24, 25, 1000}) {
        int64_t end = 0;
        for (int index = 0; index < workers; ++index) {
            const Range range = share(n, 8, Worker{index, workers, nullptr});
            wrong += range.begin != end || range.end < range.begin || (range.end % 8 != 0 && range.end != n);
            end = range.end;
        }
        wrong += end != n;
    }
    return wrong;
}

// Each round all units are worked on once, whoever does it. Returns the number of wrong ones.
static int pieces(int rounds) {
    constexpr int kUnits = 37;
    std::vector<std::atomic<int>> units(kUnits);
    std::atomic<int> wrong{0};
    Team::instance().run([&](const Worker& worker) {
        for (int round = 1; round <= rounds; ++round) {
            worker.for_pieces(kUnits, 1 + round % 3, [&](Range piece) {
                wrong += piece.size() < 1 || (worker.count > 1 && piece.size() > 1 + round % 3);
                for (int64_t unit = piece.begin; unit < piece.end; ++unit)
                    units[unit].fetch_add(1, std::memory_order_relaxed);
            });
            worker.barrier();
            for (const std::atomic<int>& unit : units)
                wrong += unit.load(std::memory_order_relaxed) != round;
            worker.barrier();
        }
        worker.for_pieces(kUnits, 5, [&](Range piece) { wrong -= int(piece.size()); });
    });
    return wrong + kUnits;
}

int main(int, char** arguments) {
    const int workers = std::atoi(arguments[1]), rounds = std::atoi(arguments[2]);
    int wrong = shares(workers);
    for (int size : {workers, 1, workers}) {
        Team::instance().resize(size, nullptr);
        wrong += Team::instance().size() != size;
        wrong += region(rounds) + region(0) + pieces(rounds) + pieces(0);
    }
    std::atomic<int> others{0};
    std::thread other([&] { others += region(rounds); });
    wrong += region(rounds);
    other.join();
    wrong += others;
#if !defined(__SANITIZE_THREAD__) // which does not follow a fork of several threads
    const pid_t child = fork();
    if (child == 0)
        _exit(Team::instance().size() == workers && region(rounds) == 0 ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    wrong += status != 0;
#endif
    wrong += region(rounds);
    std::printf("%d wrong\n", wrong);
    return wrong != 0;
}
