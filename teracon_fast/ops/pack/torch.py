"""Tables built on the host, wherever they go: filled by the compiled extension where it is loaded, else by numpy."""

from __future__ import annotations

import torch

from teracon_fast.ops import native
from teracon_fast.packing import Layer, PackedBatch, Plan, ResidualTable, Spans, TapTable, buckets, numpy_tables
from teracon_fast.packing.geometry import TableForm


def tables(plan: Plan, device: torch.device, padded: bool) -> PackedBatch:
    """As `ops.pack`."""
    spans, layers, outputs, geometry = plan
    forms, convolutions, residuals = geometry.tables
    built = [_tap_table(spans, form, layers) for form in forms]
    added = {n: ResidualTable(built[n].taps.view(-1), built[n].readers.view(-1)) for n in residuals}
    packed = PackedBatch(
        _cells(spans, layers[0], geometry.length),
        [built[number] for number in convolutions],
        [added[number] for number in residuals],
        [torch.from_numpy(rows) for rows in outputs],
    )
    return (buckets.pad(packed) if padded else packed).to(device)


def _tap_table(spans: Spans, form: TableForm, layers: list[Layer]) -> TapTable:
    lookups, inputs, outputs = form.lookups, layers[form.inputs], layers[form.outputs]
    if native.available():
        arrays = (spans.table, inputs.rank, outputs.rank, lookups.read_offset, lookups.reader_offset)
        tensors = torch.ops.teracon_fast.pack_taps(*map(torch.from_numpy, arrays), torch.get_num_threads())
    else:
        tensors = map(torch.from_numpy, numpy_tables.taps(spans, lookups, inputs, outputs))
    taps, readers, bag_rows, bag_offsets = tensors
    return TapTable(taps, readers, bag_rows, bag_offsets, outputs.rows_per_request, outputs.row_ends, inputs.rows)


def _cells(spans: Spans, first: Layer, length: int) -> torch.Tensor:
    if native.available():
        cells: torch.Tensor = torch.ops.teracon_fast.pack_cells(*map(torch.from_numpy, (spans.table, spans.user, first.rank)))
        return cells
    return torch.from_numpy(numpy_tables.cells(spans, first, length))
