"""Benchmarks of the fused head and of a training step: time, memory and error, side by side with
what else exists.

    python -m pytest benchmarks/test_head.py --benchmark-only [--quick]
    python -m benchmarks.step [--quick]
    python -m benchmarks.report

Linux only: memory and the load of the machine are read from /proc.
"""

from __future__ import annotations

import os

# Read when torch loads its libraries, so they are set before any module here imports it. CPU
# seconds would count the spinning of threads that wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Compiling in worker processes would leave them about during the timed rounds.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Read by huggingface_hub when it is imported: trainers of others report that they were started.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
