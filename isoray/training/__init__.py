"""Training: the one loop, its state, parallelism and optimizers, the Ray Train launcher, and warm lanes."""
