"""The rules of the benchmarks, their answer files, and reports of an evaluation."""
