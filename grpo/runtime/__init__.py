"""What runs the algorithm on many devices: collectives, sharding, checkpoints, CUDA graphs."""
