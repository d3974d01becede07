"""Programs that measure the figures of docs/benchmark.md and docs/scaling.md."""
