"""Policies: the interface that `grpo` uses, how they are loaded, and one file per model family."""
