"""The network: the packed backbone, `FastTCN` on top of it, its masks, its encoder for inference, its weights on disk."""
