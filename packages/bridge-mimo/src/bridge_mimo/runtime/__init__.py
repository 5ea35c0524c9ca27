"""Components on live ranks: process groups, the model, weights in and out, checkpoints. Needs torch and megatron."""
