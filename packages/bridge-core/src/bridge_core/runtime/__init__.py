"""Live models: the only room that knows processes, and the only one that imports megatron."""
