"""Adam with torch's bits: sparse gradients, rows that are updated when they are read, low-rank gradients of large heads."""
