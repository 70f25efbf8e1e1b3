"""Activation checkpointing that replays only the rows with gradient."""
