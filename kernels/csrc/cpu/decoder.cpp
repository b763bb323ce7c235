// See decoder.h.
#include "decoder.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "elementwise.h"

namespace fuseline {

namespace {

// Aligned memory that takes pages only where it is touched.
template <class T>
class Buffer {
  public:
    void reserve(int64_t n) {
        if (n <= size_)
            return;
        data_.reset();
        size_ = 0;
        data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(n * int64_t(sizeof(T)), 64))));
        if (!data_)
            throw std::bad_alloc();
        size_ = n;
    }
    T* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(T* data) const { std::free(data); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t size_ = 0;
};

int64_t sum_rows(const LinearWeight* parts, int num_parts) {
    int64_t rows = 0;
    for (int part = 0; part < num_parts; ++part)
        rows += parts[part].rows;
    return rows;
}

AttentionShape shape_of(const DecoderLayer& layer) {
    return {layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window, layer.scale};
}

} // namespace

class Decoder {
  public:
    explicit Decoder(const DecoderModel& model)
        : model_(model), layers_(model.layers, model.layers + model.num_layers) {
        int64_t packed = model.has_head ? packed_bytes(model.head, kChunkRows) : 0, wide = 0, attended = 0;
        for (const DecoderLayer& layer : layers_) {
            for (const LinearWeight* weight : {&layer.qkv[0], &layer.out, &layer.gate_up[0], &layer.down})
                packed = std::max(packed, packed_bytes(*weight, kChunkRows));
            wide = std::max({wide, sum_rows(layer.qkv, layer.num_qkv), sum_rows(layer.gate_up, layer.num_gate_up)});
            attended = std::max(attended, layer.num_heads * layer.head_dim);
            size_t plan = 0;
            while (plan < windows_.size() && windows_[plan] != layer.window)
                ++plan;
            if (plan == windows_.size())
                windows_.push_back(layer.window);
            plan_of_layer_.push_back(plan);
            scratch_floats_ = std::max(scratch_floats_, attention_scratch_floats(shape_of(layer)));
        }
        packed_.reserve(packed);
        normed_.reserve(kChunkRows * model.hidden);
        wide_.reserve(kChunkRows * wide);
        attended_.reserve(kChunkRows * attended);
    }

    int32_t run(DecoderStep& step, int64_t begin, int64_t end) {
        Team& team = Team::instance();
        if (step.prepared == 0)
            if (const int32_t failure = prepare(step, team.size()))
                return failure;
        step.prepared = 1;
        scratch_.reserve(team.size() * scratch_floats_);
        failure_ = 0;
        team.run([&](const Worker& worker) { run_ops(worker, step, begin, end); });
        step.has_delta = end - 1 == 0 ? 0 : 1;
        return failure_;
    }

  private:
    // --- before a step ---------------------------------------------------------------------------------------------

    int32_t prepare(const DecoderStep& step, int num_workers) {
        if (const int32_t failure = check(step))
            return failure;
        const Sequences sequences = sequences_of(step);
        num_chunks_ = (step.num_tokens + kChunkRows - 1) / kChunkRows;
        if (int64_t(plans_.size()) < num_chunks_ * int64_t(windows_.size()))
            plans_.resize(num_chunks_ * windows_.size());
        int64_t partials = 0;
        AttentionShape shape = shape_of(layers_[0]);
        for (size_t window = 0; window < windows_.size(); ++window)
            for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
                AttentionPlan& plan = plans_[window * num_chunks_ + chunk];
                shape.window = windows_[window];
                plan.make(sequences, shape, rows_of(chunk, step.num_tokens), num_workers);
                partials = std::max(partials, plan.num_partials);
            }
        partials_.reserve(partials * partial_floats(shape.head_dim));
        return 0;
    }

    // Whether all that a step points to exists: what shapes cannot tell.
    int32_t check(const DecoderStep& step) const {
        const auto within = [](int64_t value, int64_t bound) { return value >= 0 && value < bound; };
        for (int64_t token = 0; token < step.num_tokens; ++token) {
            if (model_.embeds && !within(step.token_ids[token], model_.vocab_size))
                return kBadToken;
            if (!within(step.slots[token], step.num_blocks * step.block_size))
                return kBadSlot;
        }
        for (int64_t sequence = 0; sequence < step.num_seqs; ++sequence) {
            const int32_t* table = step.block_tables + sequence * step.table_stride;
            const int64_t blocks = (step.context_lens[sequence] + step.block_size - 1) / step.block_size;
            for (int64_t block = 0; block < blocks; ++block)
                if (!within(table[block], step.num_blocks))
                    return kBadBlock;
        }
        for (int64_t row = 0; row < step.num_logits; ++row)
            if (!within(step.logits_indices[row], step.num_tokens))
                return kBadLogitsIndex;
        return 0;
    }

    static Sequences sequences_of(const DecoderStep& step) {
        return {step.num_seqs, step.query_start, step.context_lens, step.block_tables, step.table_stride};
    }

    static Range rows_of(int64_t chunk, int64_t num_rows) {
        return {chunk * kChunkRows, std::min((chunk + 1) * kChunkRows, num_rows)};
    }

    // --- ops: each ends with a barrier, or as the region ends ------------------------------------------------------

    void run_ops(const Worker& worker, const DecoderStep& step, int64_t begin, int64_t end) {
        bool has_delta = step.has_delta;
        const int64_t output = 1 + 2 * int64_t(layers_.size());
        for (int64_t op = begin; op < end; ++op) {
            const int64_t layer = (op - 1) / 2;
            if (op == 0)
                input(worker, step);
            else if (op == output)
                return model_.has_head ? logits(worker, step, has_delta) : hidden(worker, step, has_delta);
            else if (op % 2 == 1)
                attention_block(worker, step, layer, has_delta);
            else
                mlp_block(worker, step, layers_[layer], has_delta);
            if (op != 0 || model_.embeds)
                if (!reduce(worker, op == 0 ? step.residual : step.delta, step.num_tokens * model_.hidden))
                    return;
            has_delta = op != 0;
        }
    }

    // Worker 0 does it for all. False on every worker if it failed.
    bool reduce(const Worker& worker, float* data, int64_t n) {
        if (model_.all_reduce == nullptr)
            return true;
        if (worker.index == 0)
            failure_ = model_.all_reduce(model_.all_reduce_handle, data, n);
        worker.barrier();
        return failure_ == 0;
    }

    void input(const Worker& worker, const DecoderStep& step) const {
        const Range rows = share(step.num_tokens, 1, worker);
        const int64_t half = layers_[0].head_dim / 2, n = model_.hidden;
        const LinearWeight& table = model_.embedding;
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            cos_sin(step.positions[row], step.inv_freq + row * step.inv_freq_stride, model_.rotary_scaling, half,
                    step.cos + row * half, step.sin + row * half);
            if (!model_.embeds)
                continue;
            const int64_t local = step.token_ids[row] - model_.vocab_start;
            if (local >= 0 && local < table.rows)
                embed(table.data, table.dtype, local, table.row_stride, n, step.residual + row * n);
            else
                std::fill_n(step.residual + row * n, n, 0.0f);
        }
        worker.barrier();
    }

    void attention_block(const Worker& worker, const DecoderStep& step, int64_t index, bool has_delta) {
        const DecoderLayer& layer = layers_[index];
        const int64_t head_dim = layer.head_dim, width = (layer.num_heads + 2 * layer.num_kv_heads) * head_dim;
        const int64_t attended = layer.num_heads * head_dim;
        const KvLayer kv = kv_layer(step, layer, index);
        for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
            const Range rows = rows_of(chunk, step.num_tokens);
            const AttentionPlan& plan = plans_[plan_of_layer_[index] * num_chunks_ + chunk];
            add_norm_pack(worker, step, rows, has_delta, layer.attention_norm, layer.eps, layer.qkv[0]);
            worker.barrier();
            linear(worker, layer.qkv, layer.num_qkv, packed_.get(), rows.size(), wide_.get(), width);
            if (worker.index == 0)
                next_unit_.store(0, std::memory_order_relaxed);
            worker.barrier();
            rotate_and_append(worker, step, layer, kv, rows, width);
            worker.barrier();
            attend(
                worker,
                {shape_of(layer), kv, sequences_of(step), rows, wide_.get(), width, attended_.get(), partials_.get()},
                plan);
            worker.barrier();
            pack_input(layer.out, attended_.get(), attended, rows.size(), share(rows.size(), 4, worker), packed_.get());
            worker.barrier();
            linear(worker, &layer.out, 1, packed_.get(), rows.size(), step.delta + rows.begin * model_.hidden,
                   model_.hidden);
            worker.barrier();
        }
    }

    void mlp_block(const Worker& worker, const DecoderStep& step, const DecoderLayer& layer, bool has_delta) {
        constexpr int64_t kPiece = 512;
        const int64_t inner = layer.down.cols, pieces = (inner + kPiece - 1) / kPiece;
        for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
            const Range rows = rows_of(chunk, step.num_tokens);
            add_norm_pack(worker, step, rows, has_delta, layer.mlp_norm, layer.eps, layer.gate_up[0]);
            worker.barrier();
            linear(worker, layer.gate_up, layer.num_gate_up, packed_.get(), rows.size(), wide_.get(), 2 * inner);
            worker.barrier();
            const Range mine = share(rows.size() * pieces, 1, worker);
            for (int64_t piece = mine.begin; piece < mine.end; ++piece) {
                const int64_t at = piece % pieces * kPiece;
                float* gate = wide_.get() + piece / pieces * 2 * inner + at;
                silu_and_mul(gate, gate + inner, std::min(kPiece, inner - at));
            }
            worker.barrier();
            pack_input(layer.down, wide_.get(), 2 * inner, rows.size(), share(rows.size(), 4, worker), packed_.get());
            worker.barrier();
            linear(worker, &layer.down, 1, packed_.get(), rows.size(), step.delta + rows.begin * model_.hidden,
                   model_.hidden);
            worker.barrier();
        }
    }

    void logits(const Worker& worker, const DecoderStep& step, bool has_delta) {
        const int64_t n = model_.hidden;
        for (int64_t chunk = 0; chunk * kChunkRows < step.num_logits; ++chunk) {
            const Range rows = rows_of(chunk, step.num_logits), mine = share(rows.size(), 4, worker);
            for (int64_t row = mine.begin; row < mine.end; ++row) {
                const int64_t token = step.logits_indices[rows.begin + row];
                float* to = normed_.get() + row * n;
                std::copy_n(step.residual + token * n, n, to);
                if (has_delta)
                    add(to, step.delta + token * n, n);
                rms_norm(to, model_.norm, model_.eps, n, to);
            }
            pack_input(model_.head, normed_.get(), n, rows.size(), mine, packed_.get());
            worker.barrier();
            linear(worker, &model_.head, 1, packed_.get(), rows.size(), step.output + rows.begin * model_.head.rows,
                   model_.head.rows);
            worker.barrier();
        }
    }

    void hidden(const Worker& worker, const DecoderStep& step, bool has_delta) const {
        const Range mine = share(step.num_tokens * model_.hidden, 64, worker);
        std::copy(step.residual + mine.begin, step.residual + mine.end, step.output + mine.begin);
        if (has_delta)
            add(step.output + mine.begin, step.delta + mine.begin, mine.size());
    }

    // --- pieces: no barrier inside ---------------------------------------------------------------------------------

    // residual += delta; its norm, packed for a weight.
    void add_norm_pack(const Worker& worker, const DecoderStep& step, Range rows, bool has_delta, const float* norm,
                       float eps, const LinearWeight& weight) const {
        const int64_t n = model_.hidden;
        const Range mine = share(rows.size(), 4, worker);
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            float* residual = step.residual + (rows.begin + row) * n;
            if (has_delta)
                add(residual, step.delta + (rows.begin + row) * n, n);
            rms_norm(residual, norm, eps, n, normed_.get() + row * n);
        }
        pack_input(weight, normed_.get(), n, rows.size(), mine, packed_.get());
    }

    static KvLayer kv_layer(const DecoderStep& step, const DecoderLayer& layer, int64_t index) {
        KvLayer kv{nullptr, step.num_blocks, layer.num_kv_heads, step.block_size, layer.head_dim, DType(step.kv_dtype)};
        kv.data = static_cast<char*>(step.kv_data) + index * 2 * kv.values_offset() * kv.element_bytes();
        return kv;
    }

    void rotate_and_append(const Worker& worker, const DecoderStep& step, const DecoderLayer& layer, const KvLayer& kv,
                           Range rows, int64_t width) const {
        const int64_t head_dim = layer.head_dim, half = head_dim / 2, keys = layer.num_heads;
        const int64_t values = keys + layer.num_kv_heads, heads = values + layer.num_kv_heads;
        const Range mine = share(rows.size() * heads, 1, worker);
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const int64_t row = i / heads, head = i % heads, token = rows.begin + row;
            float* x = wide_.get() + row * width + head * head_dim;
            if (head < values) {
                if (const float* norm = head < keys ? layer.q_norm : layer.k_norm)
                    rms_norm(x, norm, layer.eps, head_dim, x);
                rotate(x, step.cos + token * half, step.sin + token * half, half);
            }
            if (head < keys)
                continue;
            const int64_t slot = step.slots[token];
            const int64_t element =
                kv.at(slot / kv.block_size, (head - keys) % layer.num_kv_heads, slot % kv.block_size);
            append(kv, head < values ? element : kv.values_offset() + element, x);
        }
    }

    void attend(const Worker& worker, const Attention& call, const AttentionPlan& plan) {
        float* scratch = scratch_.get() + worker.index * scratch_floats_;
        const int64_t count = int64_t(plan.units.size());
        for (int64_t unit; (unit = next_unit_.fetch_add(1, std::memory_order_relaxed)) < count;)
            call.run(plan.units[unit], scratch);
        if (plan.merges.empty())
            return;
        worker.barrier();
        const Range mine = share(int64_t(plan.merges.size()), 1, worker);
        for (int64_t unit = mine.begin; unit < mine.end; ++unit)
            call.merge(plan.merges[unit], scratch);
    }

    const DecoderModel model_;
    const std::vector<DecoderLayer> layers_;
    std::vector<int64_t> windows_;      // that occur among the layers
    std::vector<size_t> plan_of_layer_; // the window's index
    int64_t scratch_floats_ = 0;        // of each worker

    std::vector<AttentionPlan> plans_; // of this step, by window, then chunk
    int64_t num_chunks_ = 0;
    std::atomic<int64_t> next_unit_{0};
    int32_t failure_ = 0; // of the all-reduce; written by worker 0 in front of a barrier

    // Activations of one chunk. `wide_` holds [Q, K, V], or [gate, up].
    Buffer<char> packed_;
    Buffer<float> normed_, wide_, attended_, partials_, scratch_;
};

} // namespace fuseline

using namespace fuseline;

// Null when there is no memory. `model` is copied; what it points to must outlive the decoder.
extern "C" FUSELINE_EXPORT void* fl_cpu_decoder_create(const DecoderModel* model) {
    try {
        return new Decoder(*model);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

extern "C" FUSELINE_EXPORT void fl_cpu_decoder_destroy(void* decoder) {
    delete static_cast<Decoder*>(decoder);
}

// Runs ops [begin, end), begin < end. Returns 0, a constant of decoder.h, or what the all-reduce failed with. One
// thread at a time per decoder.
extern "C" FUSELINE_EXPORT int32_t fl_cpu_decoder_run(void* decoder, DecoderStep* step, int64_t begin, int64_t end) {
    try {
        return static_cast<Decoder*>(decoder)->run(*step, begin, end);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}
