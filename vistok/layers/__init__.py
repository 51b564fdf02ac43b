"""Building blocks, each concept once. They know nothing of models."""
