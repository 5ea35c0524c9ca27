"""Live quantised models: what their ranks hold, what they agree on, and how they write it."""
