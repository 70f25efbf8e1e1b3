"""Every causal LM class of transformers, small and random, against its own plain forwards."""
