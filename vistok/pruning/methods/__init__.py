"""Token reduction methods as pure functions of tensors; each file names its papers. Nothing here knows a model."""
