"""Who says which completion is better: a language model, a reward, or a program."""
