"""Adapters as torch modules: where they sit (`sites`), what they hold and compute (`adapter`), how they are called."""
