// Declares the builders of packed tables to the dispatcher; see csrc/cpu/packing.h for what they build.
//
// Everything that determines where they read or write is checked here: no input leads out of bounds.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cpu/packing.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows and members of bags are int32 numbers.
constexpr int64_t MOST = INT32_MAX;

const int32_t* numbers(const Tensor& tensor, int64_t count, const char* name) {
  return checked<int32_t>("packing", tensor, ScalarType::Int, count, name);
}

// Counts of a layer's offsets: 0, then steps of 0 or 1.
const int32_t* checked_rank(const Tensor& tensor, int64_t length, const char* name) {
  const int32_t* rank = numbers(tensor, length + 1, name);
  bool steps = rank[0] == 0;
  for (int64_t o = 0; o < length; ++o) {
    const int64_t step = static_cast<int64_t>(rank[o + 1]) - rank[o];
    steps = steps && (step == 0 || step == 1);
  }
  STD_TORCH_CHECK(steps, "packing: ", name, " is no count of offsets: expected 0, then steps of 0 or 1");
  return rank;
}

teracon::Spans checked_spans(const Tensor& tensor, const Tensor& rank) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == 4 && rank.numel() >= 2,
                  "packing: expected spans [4, spans] and ranks [length + 1]");
  const int64_t count = tensor.size(1), length = rank.numel() - 1;
  const int32_t* values = numbers(tensor, 4 * count, "spans");
  const teracon::Spans spans{count, length, values, values + count, values + 2 * count, values + 3 * count};
  for (int64_t s = 0; s < count; ++s) {
    const int32_t low = spans.low[s], high = spans.high[s], chain = spans.chain[s], total = spans.total[s];
    STD_TORCH_CHECK(0 <= low && low <= high && high <= total && total <= length, "packing: span ", s, " has offsets ", low,
                    " to ", high, " of ", total, ", expected 0 <= low <= high <= total <= ", length);
    STD_TORCH_CHECK(chain == s || (s > 0 && chain == spans.chain[s - 1]), "packing: span ", s, " names chain ", chain,
                    ", expected itself or its predecessor's");
    // So whatever a stream reads beyond its own end, up to its total, is one of its chain's offsets.
    STD_TORCH_CHECK(spans.low[chain] <= high && spans.high[chain] == total, "packing: span ", s, " ends at ", high, " of ",
                    total, ", but its chain has offsets ", spans.low[chain], " to ", spans.high[chain]);
  }
  return spans;
}

teracon::Layer checked_layer(const teracon::Spans& spans, const Tensor& rank, const char* name) {
  teracon::Layer layer = teracon::layer_rows(spans, checked_rank(rank, spans.length, name));
  STD_TORCH_CHECK(layer.rows + spans.length <= MOST, "packing: ", layer.rows, " rows, expected less than 2**31");
  return layer;
}

// Offsets that a layer has; outside it, reads may go beyond the sequence and readers may be -1.
const int32_t* checked_offsets(const Tensor& tensor, int64_t count, const teracon::Layer& layer, int64_t length, bool reads,
                               const char* name) {
  const int32_t* offsets = numbers(tensor, count, name);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t o = offsets[i];
    const bool inside = 0 <= o && o < length && layer.rank[o + 1] > layer.rank[o];
    STD_TORCH_CHECK(inside || (reads ? o >= length : o == -1), "packing: ", name, " has offset ", o,
                    ", which its layer lacks");
  }
  return offsets;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_taps(Tensor spans, Tensor rank_in, Tensor rank_out, Tensor read_offset,
                                                     Tensor reader_offset, int64_t threads) {
  STD_TORCH_CHECK(read_offset.dim() == 2 && read_offset.size(0) >= 1 && threads >= 1 && threads <= 4096,
                  "packing: expected read_offset [K, offsets] and 1 to 4096 threads, got ", threads);
  const teracon::Spans all = checked_spans(spans, rank_in);
  const teracon::Layer in = checked_layer(all, rank_in, "rank_in"), out = checked_layer(all, rank_out, "rank_out");
  teracon::Convolution conv{read_offset.size(0), in.rank[all.length], out.rank[all.length], nullptr, nullptr};
  const int64_t taps_of_in = conv.kernel_size * conv.places_in, taps_of_out = conv.kernel_size * conv.places_out;
  conv.read_offset = checked_offsets(read_offset, taps_of_out, in, all.length, true, "read_offset");
  conv.reader_offset = checked_offsets(reader_offset, taps_of_in, out, all.length, false, "reader_offset");

  const Tensor taps = torch::stable::new_empty(spans, {out.rows, conv.kernel_size}, ScalarType::Int);
  const Tensor readers = torch::stable::new_empty(spans, {in.rows, conv.kernel_size}, ScalarType::Int);
  const teracon::Bags bags = teracon::fill_taps(all, conv, in, out, static_cast<int>(threads),
                                                static_cast<int32_t*>(taps.data_ptr()),
                                                static_cast<int32_t*>(readers.data_ptr()));
  const auto members = static_cast<int64_t>(bags.rows.size()), ends = static_cast<int64_t>(bags.offsets.size());
  STD_TORCH_CHECK(members <= MOST && out.rows + ends <= MOST, "packing: ", members, " rows in ", ends - 1,
                  " bags, expected less than 2**31");
  const Tensor bag_rows = torch::stable::new_empty(spans, {members}, ScalarType::Int);
  const Tensor bag_offsets = torch::stable::new_empty(spans, {ends}, ScalarType::Int);
  std::copy(bags.rows.begin(), bags.rows.end(), static_cast<int32_t*>(bag_rows.data_ptr()));
  std::copy(bags.offsets.begin(), bags.offsets.end(), static_cast<int32_t*>(bag_offsets.data_ptr()));
  return {taps, readers, bag_rows, bag_offsets};
}

Tensor pack_cells(Tensor spans, Tensor users, Tensor rank) {
  const teracon::Spans all = checked_spans(spans, rank);
  const teracon::Layer first = checked_layer(all, rank, "rank");
  const int64_t* rows_of_x = checked<int64_t>("packing", users, ScalarType::Long, all.count, "users");
  for (int64_t s = 0; s < all.count; ++s) {
    STD_TORCH_CHECK(0 <= rows_of_x[s] && rows_of_x[s] <= MOST, "packing: users has row ", rows_of_x[s], " of x");
  }
  Tensor cells = torch::stable::new_empty(spans, {first.rows}, ScalarType::Long);
  teracon::fill_cells(all, rows_of_x, first, static_cast<int64_t*>(cells.data_ptr()));
  return cells;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "pack_taps(Tensor spans, Tensor rank_in, Tensor rank_out, Tensor read_offset, Tensor reader_offset, int threads) "
      "-> (Tensor taps, Tensor readers, Tensor bag_rows, Tensor bag_offsets)");
  m.def("pack_cells(Tensor spans, Tensor users, Tensor rank) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("pack_taps", TORCH_BOX(&pack_taps));
  m.impl("pack_cells", TORCH_BOX(&pack_cells));
}
