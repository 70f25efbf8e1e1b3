"""MC-PO: preference optimisation with many candidates per prompt."""

__version__ = "0.1.0"
