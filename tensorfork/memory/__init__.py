"""Memory of this process: the CUDA driver, allocations and whether they can be exported, pinned staging, raw bytes."""
