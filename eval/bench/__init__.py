"""Speed against the slow path and against other implementations, in one run."""
