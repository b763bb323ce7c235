// See attention.h.
#include "attention.h"

#include <cstring>
#include <type_traits>

#include "attention_tile.h"

namespace fuseline {

namespace {

constexpr int64_t kTileRows = 48;  // queries of one tile, as far as the heads of a group divide them
constexpr int64_t kRunKeys = 32;   // most keys that are widened at once; they and the queries stay in the first cache
constexpr int64_t kDirectRows = 8; // up to here keys are widened in registers instead: memory is what takes time

int64_t tile_positions(const AttentionShape& shape) {
    return std::max<int64_t>(1, kTileRows / shape.group());
}

int64_t tile_rows(const AttentionShape& shape) {
    return tile_positions(shape) * shape.group();
}

int64_t padded(int64_t head_dim) {
    return round_up(head_dim, kLanes);
}

// What softmax knows of one query so far: the greatest score, the sum of exp(score - greatest), and (elsewhere) that
// sum weighted with the values. Nothing yet is {-inf, 0}.
struct Softmax {
    float greatest = -kInfinity;
    float sum = 0;
};

// total = total + part, which come in the order of their positions. Nothing visible in `part` changes nothing.
void merge_split(Softmax& total, float* total_out, const Softmax& part, const float* part_out, int64_t width) {
    if (part.sum == 0)
        return;
    const float greatest = part.greatest > total.greatest ? part.greatest : total.greatest;
    const float keep = exp(total.greatest - greatest), take = exp(part.greatest - greatest);
    total.sum = total.sum * keep + part.sum * take;
    total.greatest = greatest;
    for (int64_t at = 0; at < width; at += kLanes)
        store(total_out + at, fma(load(part_out + at), splat(take), load(total_out + at) * keep));
}

// scores[low, high) of a split -> exp(score - greatest); what lies beside, as far as [from, to) (whole vectors), -> 0.
Softmax softmax(float* scores, int64_t low, int64_t high, int64_t from, int64_t to) {
    std::fill(scores + from, scores + low, -kInfinity);
    std::fill(scores + high, scores + to, -kInfinity);
    f32v greatest = splat(-kInfinity);
    for (int64_t at = from; at < to; at += kLanes)
        greatest = maximum(load(scores + at), greatest);
    Softmax result;
    result.greatest = max_lane(greatest);
    f32v sum = {};
    for (int64_t at = from; at < to; at += kLanes) {
        const f32v weight = exp(load(scores + at) - result.greatest);
        store(scores + at, weight);
        sum += weight;
    }
    result.sum = hsum(sum);
    return result;
}

// One worker's work on one unit.
template <class T>
class Tile {
  public:
    Tile(const Attention& call, const AttentionUnit& unit, float* scratch)
        : call_(call), unit_(unit), group_(call.shape.group()), rows_(unit.num_positions * group_),
          width_(padded(call.shape.head_dim)),
          table_(call.sequences.block_tables + unit.sequence * call.sequences.table_stride) {
        const int64_t most = tile_rows(call.shape);
        queries_ = take(scratch, most, width_);
        scores_ = take(scratch, most, kSplit);
        split_ = take(scratch, most, width_);
        total_ = take(scratch, most, width_);
        run_ = take(scratch, kRunKeys, width_);
        run_scales_ = take(scratch, 1, kRunKeys).data;
        softmax_ = reinterpret_cast<Softmax*>(scratch);
        is_direct_ = call.shape.head_dim == width_ && (std::is_same_v<T, float> || rows_ <= kDirectRows);
    }

    void walk() {
        load_queries();
        for (int64_t split = unit_.first_split; split < unit_.end_split; ++split) {
            attend(split);
            if (unit_.partial >= 0)
                keep_apart(split);
            else
                for (int64_t row = 0; row < rows_; ++row)
                    merge_split(total(row), total_[row], softmax_[row], split_[row], width_);
        }
        if (unit_.partial < 0)
            write_out();
    }

    void merge() {
        for (int64_t row = 0; row < rows_; ++row) {
            total(row) = {};
            std::fill_n(total_[row], width_, 0.0f);
        }
        for (int64_t split = unit_.first_split; split < unit_.end_split; ++split)
            for (int64_t row = 0; row < rows_; ++row) {
                const float* kept = partial(split, row);
                merge_split(total(row), total_[row], {kept[width_], kept[width_ + 1]}, kept, width_);
            }
        write_out();
    }

  private:
    static constexpr bool kIsScaled = std::is_same_v<T, int8_t>;

    static Rows take(float*& scratch, int64_t rows, int64_t width) {
        const Rows result{scratch, width};
        scratch += rows * width;
        return result;
    }

    Softmax& total(int64_t row) { return softmax_[tile_rows(call_.shape) + row]; }

    // Positions that a row's query sees: [low, high).
    int64_t high(int64_t row) const { return unit_.first_position + row / group_ + 1; }
    int64_t low(int64_t row) const { return call_.shape.first_visible(unit_.first_position + row / group_); }

    float* partial(int64_t split, int64_t row) const {
        return call_.partials +
               (unit_.partial + (split - unit_.first_split) * rows_ + row) * partial_floats(call_.shape.head_dim);
    }

    void load_queries() {
        const int64_t head_dim = call_.shape.head_dim;
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t token = unit_.first_token - call_.tokens.begin + row / group_;
            const float* from =
                call_.queries + token * call_.query_stride + (unit_.kv_head * group_ + row % group_) * head_dim;
            for (int64_t at = 0; at < head_dim; ++at)
                queries_[row][at] = from[at] * call_.shape.scale;
            std::fill(queries_[row] + head_dim, queries_[row] + width_, 0.0f);
            std::fill_n(total_[row], width_, 0.0f);
            total(row) = {};
        }
    }

    // Where the slot of a position lies.
    const T* at(int64_t position, bool of_values) const {
        const KvLayer& kv = call_.kv;
        const int64_t block = table_[position / kv.block_size];
        return static_cast<const T*>(kv.data) + (of_values ? kv.values_offset() : 0) +
               kv.at(block, unit_.kv_head, position % kv.block_size);
    }

    // Positions from `position` on, below `end`, that lie in one block.
    int64_t contiguous(int64_t position, int64_t end) const {
        const int64_t size = call_.kv.block_size;
        return std::min(size - position % size, end - position);
    }

    // Calls use(run, position of its first key) for positions [begin, end) of the context.
    template <class Use>
    void for_runs(int64_t begin, int64_t end, bool of_values, const Use& use) {
        for (int64_t position = begin; position < end;) {
            int64_t n = 0;
            if (is_direct_) {
                n = std::min(contiguous(position, end), kRunKeys);
                const T* const rows = at(position, of_values);
                load_scales(rows, n, run_scales_);
                use(Run<T>{rows, call_.kv.row(), n, width_ / kLanes, ahead(position, n, begin, end, of_values)},
                    position);
            } else {
                while (n < kRunKeys && position + n < end) {
                    const int64_t piece = std::min(contiguous(position + n, end), kRunKeys - n);
                    const T* const rows = at(position + n, of_values);
                    load_scales(rows, piece, run_scales_ + n);
                    widen_rows(rows, piece, run_[n]);
                    n += piece;
                }
                use(Run<float>{run_.data, width_, n, width_ / kLanes, nullptr}, position);
            }
            position += n;
        }
    }

    // What comes two runs later; behind the keys come the values. Many queries reuse a run: it need not be fetched
    // ahead.
    const T* ahead(int64_t position, int64_t n, int64_t begin, int64_t end, bool of_values) const {
        const int64_t later = position + 2 * n;
        if (rows_ > kDirectRows || (of_values && later >= end))
            return nullptr;
        return later < end ? at(later, of_values) : at(std::min(begin + later - end, end - 1), true);
    }

    // The elements alone, without their scale.
    void widen_rows(const T* from, int64_t n, float* to) const {
        const int64_t head_dim = call_.shape.head_dim, stride = call_.kv.row(), whole = head_dim / kLanes * kLanes;
        for (int64_t key = 0; key < n; ++key, from += stride, to += width_) {
            for (int64_t i = 0; i < whole; i += kLanes)
                store(to + i, load(from + i));
            for (int64_t i = whole; i < width_; ++i)
                to[i] = i < head_dim ? widen(from[i]) : 0.0f;
        }
    }

    void load_scales(const T* from, int64_t n, float* to) const {
        if constexpr (kIsScaled)
            for (int64_t key = 0; key < n; ++key)
                std::memcpy(to + key, from + key * call_.kv.row() + call_.shape.head_dim, kScaleBytes);
    }

    // The scores or weights of rows for a run's n keys or values, times the scales of those: an element's operations
    // are the same whether its run was widened or not.
    void scale_run(const Rows& scores, int64_t n, Range rows) const {
        if constexpr (kIsScaled)
            for (int64_t row = rows.begin; row < rows.end; ++row)
                for (int64_t key = 0; key < n; ++key)
                    scores[row][key] *= run_scales_[key];
    }

    // Rows that see position `first` if their window allows, and `last` if it is not in their future.
    Range rows_seeing(int64_t first, int64_t last) const {
        const auto row = [&](int64_t position) {
            return std::clamp<int64_t>((position - unit_.first_position) * group_, 0, rows_);
        };
        const int64_t window = call_.shape.window;
        return {row(last), window == 0 ? rows_ : row(first + window)};
    }

    // split_ and softmax_ of all rows, of the positions of one split.
    void attend(int64_t split) {
        const int64_t start = split * kSplit;
        const int64_t begin = std::max(start, low(0)), end = std::min(start + kSplit, high(rows_ - 1));
        for_runs(begin, end, false, [&](const auto& keys, int64_t position) {
            const Range any = rows_seeing(position + keys.n - 1, position);
            const Rows scores{scores_.data + position - start, kSplit};
            score(keys, queries_, scores, any.begin, any.end);
            scale_run(scores, keys.n, any);
        });
        const int64_t from = (begin - start) / kLanes * kLanes, to = round_up(end - start, kLanes);
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t seen_from = std::max(begin, low(row)), seen_to = std::min(end, high(row));
            const bool is_seen = seen_from < seen_to;
            softmax_[row] = is_seen ? softmax(scores_[row], seen_from - start, seen_to - start, from, to) : Softmax{};
            std::fill_n(split_[row], width_, 0.0f);
        }
        for_runs(begin, end, true, [&](const auto& values, int64_t position) { weigh_run(values, position, start); });
    }

    // Rows that see all of a run are done in blocks. For those that see a part only, the rest is left out rather than
    // weighted with zero: it may be NaN.
    template <class R>
    void weigh_run(const R& values, int64_t position, int64_t start) {
        const Rows weights{scores_.data + position - start, kSplit};
        const Range whole = rows_seeing(position, position + values.n - 1);
        const Range any = rows_seeing(position + values.n - 1, position);
        scale_run(weights, values.n, any);
        if (whole.begin < whole.end)
            weigh(values, weights, split_, whole.begin, whole.end);
        for (int64_t row = any.begin; row < any.end; row += group_) {
            if (whole.begin <= row && row < whole.end)
                continue;
            const int64_t from = std::max(position, low(row)), to = std::min(position + values.n, high(row));
            R seen = values;
            seen.data += (from - position) * values.stride;
            seen.n = to - from;
            weigh(seen, {weights.data + from - position, kSplit}, split_, row, row + group_);
        }
    }

    void keep_apart(int64_t split) {
        for (int64_t row = 0; row < rows_; ++row) {
            float* to = partial(split, row);
            std::copy_n(split_[row], width_, to);
            to[width_] = softmax_[row].greatest;
            to[width_ + 1] = softmax_[row].sum;
        }
    }

    void write_out() {
        const int64_t head_dim = call_.shape.head_dim;
        for (int64_t row = 0; row < rows_; ++row) {
            const float inverse = 1.0f / total(row).sum;
            const int64_t token = unit_.first_token - call_.tokens.begin + row / group_;
            float* to = call_.out + (token * call_.shape.num_heads + unit_.kv_head * group_ + row % group_) * head_dim;
            for (int64_t at = 0; at < head_dim; ++at)
                to[at] = total_[row][at] * inverse;
        }
    }

    const Attention& call_;
    const AttentionUnit& unit_;
    const int64_t group_, rows_, width_;
    const int32_t* const table_;
    Rows queries_, scores_, split_, total_, run_;
    float* run_scales_; // of a run's keys or values, where they have some
    Softmax* softmax_;  // of a split by row, then of all so far by row
    bool is_direct_;
};

} // namespace

int64_t attention_scratch_floats(const AttentionShape& shape) {
    const int64_t rows = tile_rows(shape), width = padded(shape.head_dim);
    return round_up(rows * (3 * width + kSplit + 4) + kRunKeys * (width + 1), 16);
}

int64_t partial_floats(int64_t head_dim) {
    return padded(head_dim) + kLanes;
}

void Attention::run(const AttentionUnit& unit, float* scratch) const {
    switch (kv.dtype) {
    case DType::bf16:
        return Tile<bf16>(*this, unit, scratch).walk();
    case DType::f16:
        return Tile<f16>(*this, unit, scratch).walk();
    case DType::i8:
        return Tile<int8_t>(*this, unit, scratch).walk();
    default:
        return Tile<float>(*this, unit, scratch).walk();
    }
}

void Attention::merge(const AttentionUnit& unit, float* scratch) const {
    Tile<float>(*this, unit, scratch).merge();
}

void AttentionPlan::make(const Sequences& sequences, const AttentionShape& shape, Range tokens, int num_workers) {
    units.clear();
    merges.clear();
    num_partials = 0;
    for (int64_t sequence = 0; sequence < sequences.count; ++sequence) {
        const int64_t end = std::min(tokens.end, sequences.query_end(sequence));
        for (int64_t token = std::max<int64_t>(tokens.begin, sequences.query_start[sequence]); token < end;) {
            const int64_t n = std::min(tile_positions(shape), end - token);
            const int64_t position = sequences.position(sequence, token);
            const int64_t first_split = shape.first_visible(position) / kSplit;
            const int64_t end_split = (position + n - 1) / kSplit + 1;
            for (int64_t head = 0; head < shape.num_kv_heads; ++head)
                units.push_back({int32_t(sequence), int32_t(head), token, n, position, first_split, end_split, -1});
            token += n;
        }
    }
    if (num_workers > 1 && int64_t(units.size()) < 4 * num_workers) {
        std::vector<AttentionUnit> whole;
        whole.swap(units);
        for (AttentionUnit& unit : whole) {
            const int64_t rows = unit.num_positions * shape.group() * (unit.end_split - unit.first_split);
            if (unit.end_split - unit.first_split == 1 || num_partials + rows > kMaxPartials) {
                units.push_back(unit);
                continue;
            }
            unit.partial = num_partials;
            merges.push_back(unit);
            for (int64_t split = unit.first_split; split < unit.end_split; ++split) {
                AttentionUnit part = unit;
                part.first_split = split;
                part.end_split = split + 1;
                part.partial = num_partials + (split - unit.first_split) * unit.num_positions * shape.group();
                units.push_back(part);
            }
            num_partials += rows;
        }
    }
    const auto cost = [](const AttentionUnit& unit) {
        return (unit.end_split - unit.first_split) * unit.num_positions;
    };
    std::stable_sort(units.begin(), units.end(),
                     [&](const AttentionUnit& a, const AttentionUnit& b) { return cost(a) > cost(b); });
}

} // namespace fuseline
