"""Running on many devices: collectives, sharding, checkpoints, CUDA graphs."""
