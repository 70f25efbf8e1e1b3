"""The price of a whole training step, beside a DPO step and a naive MC-PO step.

    python -m benchmarks.step --model smollm2-135m --prompt 256 --completion 128 --pool 5
    python -m pytest benchmarks/test_step.py --benchmark-only [--quick]
    python -m benchmarks.report

What an arm is, and why they are comparable: ``problem.py``. What is counted: ``flops.py``.
"""
