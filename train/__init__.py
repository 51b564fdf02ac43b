"""Training scripts to run and to copy; what `vistok train` does, in sight."""
