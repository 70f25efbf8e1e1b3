"""Cross-compiles every Triton kernel for every target, without a GPU, and judges the machine code.

python -m mcpo_kernels.targets --quick
"""
