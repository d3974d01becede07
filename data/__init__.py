"""Files to examples and prompts, completions to rewards; what the demo, published data sets and benchmarks need."""
