"""One worker process per GPU: process group, weights, KV cache, forward pass and sampler."""
