"""The fused head for GPUs, in Triton."""
