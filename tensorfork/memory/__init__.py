"""The memory of this process: the CUDA driver and its allocations, streams, kernels, pinned staging, raw bytes."""
