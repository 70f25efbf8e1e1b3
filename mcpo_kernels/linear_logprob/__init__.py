"""The fused language-model head: linear, log-softmax, gather, sum."""
