/// One step of a plain layer for the instruction set that a file is compiled for: gate sums, activations, new state.
///
/// A single row is bound by reading its weights, and by latency where they are few: as many panels at once as there are
/// registers for their sums, which stay there until they are activated. Several rows go through product.h, whose tiles
/// read a weight once for six rows.
#pragma once

#include "core/activations.h"
#include "core/kernels.h"
#include "core/pack.h"
#include "core/product.h"
#include "core/weights.h"

namespace cellstep {
namespace core {
namespace CELLSTEP_ISA {

/// What a row's step reads and writes; all point at the row.
template <class T>
struct RowState {
    std::size_t units;
    const T* c;
    T* c_next;
    T* h_next;
    T* gates;  ///< null, or i of the row, f, g and o behind it
    bool fast;
};

template <class T>
inline RowState<T> row_state(const Step<T>& s, std::size_t row) {
    return {s.hidden_size,
            s.c + row * s.hidden_size,
            s.c_next + row * s.hidden_size,
            s.h_next + static_cast<std::ptrdiff_t>(row) * s.h_next_stride,
            s.gates ? s.gates + row * gate_count * s.hidden_size : nullptr,
            s.fast};
}

/// Gates of some units as fractions, so that i g and o tanh(c) take one division each.
template <class T, int Lanes, bool Fast>
struct Gates {
    using V = Vector<T, Lanes>;
    Fraction<V> gate[gate_count];

    /// c in, h out; c is the new one afterwards.
    CELLSTEP_INLINE V move(V* c) const {
        const Fraction<V>&i = gate[0], &f = gate[1], &g = gate[2], &o = gate[3];
        *c = fma(f.over / f.under, *c, (i.over * g.over) / (i.under * g.under));
        const Fraction<V> squashed = cell_fraction<T, Lanes, Fast>(*c);
        return (o.over * squashed.over) / (o.under * squashed.under);
    }
    CELLSTEP_INLINE V value(std::size_t at) const { return gate[at].over / gate[at].under; }
};

/// Moves Lanes units from `unit` on.
template <class T, int Lanes, bool Fast>
CELLSTEP_INLINE void move_units(const RowState<T>& row, std::size_t unit, const Gates<T, Lanes, Fast>& gates) {
    using V = Vector<T, Lanes>;
    const std::size_t count = row.units - unit;
    V c = load_part<V>(row.c + unit, count);
    const V h = gates.move(&c);
    store_part(row.c_next + unit, c, count);
    store_part(row.h_next + unit, h, count);
    if (!row.gates) return;
    for (std::size_t at = 0; at < gate_count; ++at)
        store_part(row.gates + at * row.units + unit, gates.value(at), count);
}

template <class T, int Width, int Vectors, bool Fast>
CELLSTEP_INLINE void move_panel_as(const RowState<T>& row, std::size_t unit,
                                   const Vector<T, native_lanes<T>> (&sum)[Vectors]) {
    constexpr int lanes = native_lanes<T>;
    if constexpr (lanes <= Width) {
        constexpr int parts = Width / lanes;
        for (int part = 0; part < parts; ++part) {
            const std::size_t first = unit + static_cast<std::size_t>(part * lanes);
            if (part > 0 && first >= row.units) break;
            move_units<T, lanes, Fast>(
                row, first,
                {{gate_fraction<T, lanes, Fast>(sum[part]), gate_fraction<T, lanes, Fast>(sum[parts + part]),
                  cell_fraction<T, lanes, Fast>(sum[2 * parts + part]),
                  gate_fraction<T, lanes, Fast>(sum[3 * parts + part])}});
        }
    } else {
        // Several gates share a register: one sigmoid serves them all, and the lanes of g take a tanh of their own.
        constexpr int shared = lanes / Width;
        using Part = Vector<T, Width>;
        Gates<T, Width, Fast> gates;
        for (int v = 0; v < Vectors; ++v) {
            const Fraction<Vector<T, lanes>> all = gate_fraction<T, lanes, Fast>(sum[v]);
            Part over[shared];
            Part under[shared];
            __builtin_memcpy(over, &all.over, sizeof(over));
            __builtin_memcpy(under, &all.under, sizeof(under));
            for (int at = 0; at < shared; ++at) gates.gate[v * shared + at] = {over[at], under[at]};
        }
        Part candidates[shared];
        __builtin_memcpy(candidates, &sum[2 / shared], sizeof(candidates));
        gates.gate[2] = cell_fraction<T, Width, Fast>(candidates[2 % shared]);
        move_units<T, Width, Fast>(row, unit, gates);
    }
}

/// Activates a panel of Width units whose sums lie in registers, gates i, f, g, o one after the other.
template <class T, int Width, int Vectors>
CELLSTEP_INLINE void move_panel(const RowState<T>& row, std::size_t unit,
                                const Vector<T, native_lanes<T>> (&sum)[Vectors]) {
    if (row.fast)
        move_panel_as<T, Width, Vectors, true>(row, unit, sum);
    else
        move_panel_as<T, Width, Vectors, false>(row, unit, sum);
}

/// What becomes of a row's sums: new state.
template <class T>
struct Move {
    RowState<T> row;
    template <int Width, int Vectors>
    CELLSTEP_INLINE void panel(std::size_t unit, const Vector<T, native_lanes<T>> (&sum)[Vectors]) const {
        move_panel<T, Width, Vectors>(row, unit, sum);
    }
};

/// What becomes of a row's sums: they go back to where they began.
template <class T>
struct KeepSums {
    const Step<T>& step;
    template <int Width, int Vectors>
    CELLSTEP_INLINE void panel(std::size_t unit, const Vector<T, native_lanes<T>> (&sum)[Vectors]) const {
        T* target = step.sums + gate_count * (unit * step.sums_rows + step.sums_row * Width);
        for (int v = 0; v < Vectors; ++v) store(target + v * native_lanes<T>, sum[v]);
    }
};

/// The sums of a row that are formed at once, and where their panels and first values lie.
template <class T, int Width, int Panels>
struct RowSums {
    static constexpr int vectors = static_cast<int>(gate_count) * Width / native_lanes<T>;
    using V = Vector<T, native_lanes<T>>;
    V sum[Panels > 0 ? Panels : 1][vectors];

    CELLSTEP_INLINE void begin(const T* first, std::size_t stride) {
        for (int p = 0; p < Panels; ++p)
            for (int v = 0; v < vectors; ++v)
                sum[p][v] = load<V>(first + static_cast<std::size_t>(p) * stride + v * native_lanes<T>);
    }
    template <class W>
    CELLSTEP_INLINE void add(V value, const typename W::Stored* weights, std::size_t stride) {
        for (int p = 0; p < Panels; ++p)
            for (int v = 0; v < vectors; ++v)
                sum[p][v] = fma(
                    value, W::template widen<V>(weights + static_cast<std::size_t>(p) * stride + v * native_lanes<T>),
                    sum[p][v]);
    }
};

/// Full panels of 16 units, then perhaps one of 8 and one of 4, for one row.
template <class T, class W, int Full, int Half, int Quarter, class Finish>
inline void row_panels(const Step<T>& s, std::size_t unit, const unsigned char* packed, const Finish& finish) {
    using V = Vector<T, native_lanes<T>>;
    using Stored = typename W::Stored;
    const std::size_t depth = s.input_size + s.recurrent_size;
    const std::size_t full_bytes = panel_bytes<T>(W::type, 16, depth);
    const std::size_t unit_half = unit + 16 * Full;
    const std::size_t unit_quarter = unit_half + 8 * Half;
    const unsigned char* half = packed + Full * full_bytes;
    const unsigned char* quarter = half + Half * panel_bytes<T>(W::type, 8, depth);
    const auto first = [&s](std::size_t at, std::size_t width, const unsigned char* panel) {
        return s.sums ? s.sums + gate_count * (at * s.sums_rows + s.sums_row * width)
                      : reinterpret_cast<const T*>(panel);
    };
    RowSums<T, 16, Full> full_sums;
    RowSums<T, 8, Half> half_sums;
    RowSums<T, 4, Quarter> quarter_sums;
    full_sums.begin(first(unit, 16, packed), s.sums ? 64 * s.sums_rows : full_bytes / sizeof(T));
    half_sums.begin(first(unit_half, 8, half), 0);
    quarter_sums.begin(first(unit_quarter, 4, quarter), 0);

    // A column's weights begin behind its bias, which always has the type that is computed in.
    const auto weights = [](const unsigned char* panel, std::size_t columns) {
        return reinterpret_cast<const Stored*>(panel + columns * sizeof(T));
    };
    const std::size_t stride = full_bytes / sizeof(Stored);
    const Stored* w_full = weights(packed, 64);
    const Stored* w_half = weights(half, 32);
    const Stored* w_quarter = weights(quarter, 16);
    const auto add = [&](const T* values, std::size_t count) {
        for (std::size_t k = 0; k < count; ++k) {
            const V value = broadcast<V>(values[k]);
            full_sums.template add<W>(value, w_full + 64 * k, stride);
            half_sums.template add<W>(value, w_half + 32 * k, 0);
            quarter_sums.template add<W>(value, w_quarter + 16 * k, 0);
        }
        w_full += 64 * count;
        w_half += 32 * count;
        w_quarter += 16 * count;
    };
    if (s.sums) {
        w_full += 64 * s.input_size;
        w_half += 32 * s.input_size;
        w_quarter += 16 * s.input_size;
    } else {
        add(s.x, s.input_size);
    }
    add(s.h, s.recurrent_size);
    for (int p = 0; p < Full; ++p) finish.template panel<16>(unit + 16 * static_cast<std::size_t>(p), full_sums.sum[p]);
    if (Half) finish.template panel<8>(unit_half, half_sums.sum[0]);
    if (Quarter) finish.template panel<4>(unit_quarter, quarter_sums.sum[0]);
}

/// Full panels whose sums find registers at once.
template <class T>
constexpr int panels_at_once = (native_registers == 32 ? 16 : 8) / RowSums<T, 16, 1>::vectors;

template <class T, class W, int Full, class Finish>
inline void row_end(const Step<T>& s, std::size_t unit, const unsigned char* packed, std::size_t rest,
                    const Finish& finish) {
    if (rest > 8) return row_panels<T, W, Full, 1, 1>(s, unit, packed, finish);
    if (rest > 4) return row_panels<T, W, Full, 1, 0>(s, unit, packed, finish);
    if (rest > 0) return row_panels<T, W, Full, 0, 1>(s, unit, packed, finish);
    if (Full > 0) row_panels<T, W, Full, 0, 0>(s, unit, packed, finish);
}

/// All panels of one row, in groups whose sums stay in registers.
template <class T, class W, class Finish>
inline void row_groups(const Step<T>& s, const Finish& finish) {
    constexpr std::size_t most = panels_at_once<T> < 2 ? panels_at_once<T> : 2;
    const std::size_t full_bytes = panel_bytes<T>(W::type, 16, s.input_size + s.recurrent_size);
    const unsigned char* packed = static_cast<const unsigned char*>(s.packed);
    const std::size_t panels = full_panels(s.last_unit - s.first_unit);
    const std::size_t groups = panels > most ? (panels - 1) / most : 0;  // those before the last one
    const auto end = [&] {
        const std::size_t unit = s.first_unit + 16 * most * groups;
        const std::size_t last = panels - most * groups;
        const std::size_t rest = unit + 16 * last < s.last_unit ? s.last_unit - unit - 16 * last : 0;
        const unsigned char* panel = packed + unit / 16 * full_bytes;
        if (last == 0) return row_end<T, W, 0>(s, unit, panel, rest, finish);
        if (last == 1) return row_end<T, W, 1>(s, unit, panel, rest, finish);
        if constexpr (most == 2) row_end<T, W, 2>(s, unit, panel, rest, finish);
    };
    if (s.backwards) end();
    for (std::size_t at = 0; at < groups; ++at) {
        const std::size_t unit = s.first_unit + 16 * most * (s.backwards ? groups - 1 - at : at);
        row_panels<T, W, static_cast<int>(most), 0, 0>(s, unit, packed + unit / 16 * full_bytes, finish);
    }
    if (!s.backwards) end();
}

/// Several parts of Width values as one vector; read(index) gives a part.
template <class T, int Width, int Parts, class Read>
CELLSTEP_INLINE Vector<T, Width * Parts> collect(std::size_t first, const Read& read) {
    if constexpr (Parts == 1)
        return read(first);
    else
        return Halves<T, Width * Parts>::join(collect<T, Width, Parts / 2>(first, read),
                                              collect<T, Width, Parts / 2>(first + Parts / 2, read));
}

/// The way back: write(index, part) takes a part.
template <class T, int Width, int Parts, class Write>
CELLSTEP_INLINE void spread(Vector<T, Width * Parts> value, std::size_t first, const Write& write) {
    if constexpr (Parts == 1) {
        write(first, value);
    } else {
        spread<T, Width, Parts / 2>(Halves<T, Width * Parts>::low(value), first, write);
        spread<T, Width, Parts / 2>(Halves<T, Width * Parts>::high(value), first + Parts / 2, write);
    }
}

/// As many rows of a narrow panel as a vector has room for, each part of it a row.
template <class T, int Width, int Rows, bool Fast>
inline void move_rows_at_once(const Step<T>& s, std::size_t first, std::size_t unit,
                              const T* sums) CELLSTEP_NONBLOCKING {
    using Part = Vector<T, Width>;
    constexpr int lanes = Rows * Width;
    using V = Vector<T, lanes>;
    const std::size_t units = s.hidden_size;
    const std::size_t count = units - unit;
    const auto gate = [&](std::size_t at) {
        return collect<T, Width, Rows>(0,
                                       [&](std::size_t r) { return load<Part>(sums + (gate_count * r + at) * Width); });
    };
    const Gates<T, lanes, Fast> gates{{gate_fraction<T, lanes, Fast>(gate(0)), gate_fraction<T, lanes, Fast>(gate(1)),
                                       cell_fraction<T, lanes, Fast>(gate(2)), gate_fraction<T, lanes, Fast>(gate(3))}};
    V c = collect<T, Width, Rows>(first,
                                  [&](std::size_t row) { return load_part<Part>(s.c + row * units + unit, count); });
    const V h = gates.move(&c);
    spread<T, Width, Rows>(c, first,
                           [&](std::size_t row, Part part) { store_part(s.c_next + row * units + unit, part, count); });
    spread<T, Width, Rows>(h, first, [&](std::size_t row, Part part) {
        store_part(s.h_next + static_cast<std::ptrdiff_t>(row) * s.h_next_stride + unit, part, count);
    });
    if (!s.gates) return;
    for (std::size_t at = 0; at < gate_count; ++at)
        spread<T, Width, Rows>(gates.value(at), first, [&](std::size_t row, Part part) {
            store_part(s.gates + (gate_count * row + at) * units + unit, part, count);
        });
}

template <class T, int Width>
inline void move_rows(const Step<T>& s, std::size_t unit, const T* sums) {
    constexpr int vectors = RowSums<T, Width, 1>::vectors;
    constexpr int at_once = native_lanes<T> / Width;
    using V = Vector<T, native_lanes<T>>;
    std::size_t row = 0;
    if constexpr (at_once > 1) {
        const auto move =
            s.fast ? move_rows_at_once<T, Width, at_once, true> : move_rows_at_once<T, Width, at_once, false>;
        for (; row + at_once <= s.rows; row += at_once, sums += at_once * gate_count * Width) move(s, row, unit, sums);
    }
    for (; row < s.rows; ++row, sums += gate_count * Width) {
        V sum[vectors];
        for (int v = 0; v < vectors; ++v) sum[v] = load<V>(sums + v * native_lanes<T>);
        move_panel<T, Width, vectors>(row_state(s, row), unit, sum);
    }
}

template <class T, class W>
inline void widen_all(const void* stored, std::size_t count, T* widened) {
    constexpr std::size_t lanes = static_cast<std::size_t>(native_lanes<T>);
    using V = Vector<T, native_lanes<T>>;
    const auto* from = static_cast<const typename W::Stored*>(stored);
    for (std::size_t at = 0; at < count; at += lanes) store(widened + at, W::template widen<V>(from + at));
}

/// Counts are multiples of 16, as panels are at least 4 units of 4 gates wide.
template <class T>
inline void widen_weights(WeightType type, const void* stored, std::size_t count, T* widened) CELLSTEP_NONBLOCKING {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (type == WeightType::bfloat16) return widen_all<T, Bfloat16Weights>(stored, count, widened);
        if (type == WeightType::float16) return widen_all<T, Float16Weights>(stored, count, widened);
    }
    widen_all<T, FullWeights<T>>(stored, count, widened);
}

/// The weights of a panel in the type that is computed in: themselves, or widened into scratch memory.
template <class T>
inline const T* full_weights(WeightType type, const unsigned char* panel, std::size_t columns, std::size_t depth,
                             T* scratch) {
    const unsigned char* weights = panel + columns * sizeof(T);
    if (type == WeightType::full) return reinterpret_cast<const T*>(weights);
    widen_weights<T>(type, weights, columns * depth, scratch);
    return scratch;
}

/// The panel of `width` units from `unit` on, for several rows.
template <class T>
inline void step_panel(const Step<T>& s, std::size_t unit, std::size_t width, const unsigned char* packed) {
    const std::size_t depth = s.input_size + s.recurrent_size;
    const std::size_t columns = gate_count * width;
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(columns);
    const T* weights = full_weights<T>(s.weights, packed, columns, depth, s.scratch + s.rows * 64);
    T* sums = s.scratch;
    if (s.sums) {
        sums = s.sums + gate_count * (unit * s.sums_rows + s.sums_row * width);
        product<T>({s.rows, columns, s.recurrent_size, s.h, s.h_stride, 1, weights + s.input_size * columns, stride,
                    sums, stride});
    } else {
        product<T>({s.rows, columns, s.recurrent_size, s.h, s.h_stride, 1, weights, stride, sums, stride,
                    reinterpret_cast<const T*>(packed), s.input_size, s.x, s.x_stride});
    }
    if (width == 16)
        move_rows<T, 16>(s, unit, sums);
    else if (width == 8)
        move_rows<T, 8>(s, unit, sums);
    else
        move_rows<T, 4>(s, unit, sums);
}

template <class T>
inline void step_rows(const Step<T>& s) {
    const std::size_t depth = s.input_size + s.recurrent_size;
    const std::size_t full_bytes = panel_bytes<T>(s.weights, 16, depth);
    const unsigned char* packed = static_cast<const unsigned char*>(s.packed);
    const std::size_t panels = full_panels(s.last_unit - s.first_unit);
    const auto tail = [&] {
        std::size_t unit = s.first_unit + 16 * panels;
        const unsigned char* panel = packed + unit / 16 * full_bytes;
        while (unit < s.last_unit) {
            const std::size_t width = panel_width(s.last_unit - unit);
            step_panel<T>(s, unit, width, panel);
            unit += width;
            panel += panel_bytes<T>(s.weights, width, depth);
        }
    };
    if (s.backwards) tail();
    for (std::size_t at = 0; at < panels; ++at) {
        const std::size_t unit = s.first_unit + 16 * (s.backwards ? panels - 1 - at : at);
        step_panel<T>(s, unit, 16, packed + unit / 16 * full_bytes);
    }
    if (!s.backwards) tail();
}

/// Calls row_groups for the type of the weights.
template <class T, class Finish>
inline void row_of_weights(const Step<T>& s, const Finish& finish) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (s.weights == WeightType::bfloat16) return row_groups<T, Bfloat16Weights>(s, finish);
        if (s.weights == WeightType::float16) return row_groups<T, Float16Weights>(s, finish);
    }
    row_groups<T, FullWeights<T>>(s, finish);
}

template <class T>
inline void step(const Step<T>& s) CELLSTEP_NONBLOCKING {
    if constexpr (panels_at_once<T> > 0)
        if (s.rows == 1) return row_of_weights<T>(s, Move<T>{row_state(s, 0)});
    step_rows<T>(s);
}

}  // namespace CELLSTEP_ISA
}  // namespace core
}  // namespace cellstep
