#include "packing.h"

#include <algorithm>

namespace teracon {
namespace {

// An offset per (place, tap) and its rank in the layer it lies in. With the taps side by side, as in the tables, a span's
// part of a table is one loop over consecutive numbers.
struct Lookup {
  std::vector<int32_t> offset, rank;
};

Lookup by_place(const int32_t* offsets, int64_t kernel_size, int64_t places, const int32_t* rank, int64_t length) {
  Lookup lookup{std::vector<int32_t>(kernel_size * places), std::vector<int32_t>(kernel_size * places)};
  for (int64_t k = 0; k < kernel_size; ++k) {
    for (int64_t p = 0; p < places; ++p) {
      const int64_t offset = offsets[k * places + p];
      lookup.offset[p * kernel_size + k] = static_cast<int32_t>(offset);
      lookup.rank[p * kernel_size + k] = rank[std::clamp<int64_t>(offset, 0, length)];
    }
  }
  return lookup;
}

int64_t first_place(const Spans& spans, const Layer& layer, int64_t s) { return layer.rank[spans.low[s]]; }

int64_t end_place(const Spans& spans, const Layer& layer, int64_t s) { return layer.rank[spans.high[s]]; }

int64_t row_of(const Layer& layer, int64_t s, int64_t place) { return layer.start[s] + place; }

// Calls visit(output row, input row, tap) wherever stream `s` reads into its chain.
template <class Visit>
void for_each_pad_read(const Spans& spans, const Lookup& reads, int64_t kernel_size, const Layer& in, const Layer& out,
                       int64_t s, Visit visit) {
  const int32_t high = spans.high[s], total = spans.total[s];
  const int64_t chain_start = in.start[spans.chain[s]];
  // From the stream's far end, where pads begin. Tap 0 reads the furthest: once it stays inside the stream, all do.
  for (int64_t place = end_place(spans, out, s) - 1; place >= first_place(spans, out, s); --place) {
    const int32_t* offset = reads.offset.data() + place * kernel_size;
    const int32_t* rank = reads.rank.data() + place * kernel_size;
    if (offset[0] < high) break;
    for (int64_t k = 0; k < kernel_size; ++k) {
      if (offset[k] >= high && offset[k] < total) visit(row_of(out, s, place), chain_start + rank[k], k);
    }
  }
}

// One request at a time: a chain's rows and the bags that they get fit the caches.
Bags fill_bags(const Spans& spans, const Lookup& reads, int64_t kernel_size, const Layer& in, const Layer& out,
               int32_t* readers) {
  Bags bags{{}, {0}};
  std::vector<int64_t> slot;
  for (int64_t chain = 0, end; chain < spans.count; chain = end) {
    for (end = chain + 1; end < spans.count && spans.chain[end] == chain;) ++end;
    const int64_t first = row_of(in, chain, first_place(spans, in, chain));
    const int64_t rows = end_place(spans, in, chain) - first_place(spans, in, chain);
    int32_t* chained = readers + first * kernel_size;

    slot.assign(rows * kernel_size, 0);
    for (int64_t s = chain + 1; s < end; ++s) {
      for_each_pad_read(spans, reads, kernel_size, in, out, s,
                        [&](int64_t, int64_t row, int64_t k) { ++slot[(row - first) * kernel_size + k]; });
    }
    // Counts become places in `bags.rows`. The chain's own reader comes first: its row is before those of all streams.
    for (int64_t i = 0; i < rows * kernel_size; ++i) {
      const int64_t count = slot[i];
      if (count == 0) continue;
      if (chained[i] >= 0) bags.rows.push_back(chained[i]);
      slot[i] = static_cast<int64_t>(bags.rows.size());
      bags.rows.resize(slot[i] + count);
      chained[i] = static_cast<int32_t>(out.rows + static_cast<int64_t>(bags.offsets.size()) - 1);
      bags.offsets.push_back(static_cast<int32_t>(bags.rows.size()));
    }
    for (int64_t s = chain + 1; s < end; ++s) {
      for_each_pad_read(spans, reads, kernel_size, in, out, s, [&](int64_t reader, int64_t row, int64_t k) {
        bags.rows[slot[(row - first) * kernel_size + k]++] = static_cast<int32_t>(reader);
      });
    }
  }
  return bags;
}

}  // namespace

Layer layer_rows(const Spans& spans, const int32_t* rank) {
  Layer layer{rank, std::vector<int32_t>(spans.count), 0};
  for (int64_t s = 0; s < spans.count; ++s) {
    layer.start[s] = static_cast<int32_t>(layer.rows - rank[spans.low[s]]);
    layer.rows += rank[spans.high[s]] - rank[spans.low[s]];
  }
  return layer;
}

Bags fill_taps(const Spans& spans, const Convolution& conv, const Layer& in, const Layer& out, int threads, int32_t* taps,
               int32_t* readers) {
  const int64_t kernel_size = conv.kernel_size;
  const Lookup reads = by_place(conv.read_offset, kernel_size, conv.places_out, in.rank, spans.length);
  const Lookup backs = by_place(conv.reader_offset, kernel_size, conv.places_in, out.rank, spans.length);

  // Every span writes its own rows, so the number of threads changes nothing in the tables.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t s = 0; s < spans.count; ++s) {
    const int32_t low = spans.low[s], high = spans.high[s], total = spans.total[s];
    const int32_t start_in = in.start[s], chain = in.start[spans.chain[s]], start_out = out.start[s];
    int64_t place = first_place(spans, out, s);
    int64_t count = (end_place(spans, out, s) - place) * kernel_size;
    const int32_t* offset = reads.offset.data() + place * kernel_size;
    const int32_t* rank = reads.rank.data() + place * kernel_size;
    int32_t* table = taps + row_of(out, s, place) * kernel_size;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t row = (offset[i] < high ? start_in : chain) + rank[i];
      table[i] = offset[i] < total ? row : -1;
    }

    place = first_place(spans, in, s);
    count = (end_place(spans, in, s) - place) * kernel_size;
    offset = backs.offset.data() + place * kernel_size;
    rank = backs.rank.data() + place * kernel_size;
    table = readers + row_of(in, s, place) * kernel_size;
    // Offset -1 marks "no reader"; low is never below 0, so one comparison covers both cases.
    for (int64_t i = 0; i < count; ++i) {
      const int32_t row = start_out + rank[i];
      table[i] = offset[i] < low ? -1 : row;
    }
  }
  return fill_bags(spans, reads, kernel_size, in, out, readers);
}

void fill_cells(const Spans& spans, const int64_t* users, const Layer& first, int64_t* cells) {
  for (int64_t s = 0; s < spans.count; ++s) {
    const int64_t last = users[s] * spans.length + spans.total[s] - 1;
    for (int64_t offset = spans.low[s]; offset < spans.high[s]; ++offset) {
      if (first.rank[offset + 1] > first.rank[offset]) *cells++ = last - offset;
    }
  }
}

}  // namespace teracon
