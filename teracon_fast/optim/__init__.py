"""Adam with the bits of PyTorch's: sparse gradients, lazy updates of embedding rows, low-rank gradients of large heads."""
