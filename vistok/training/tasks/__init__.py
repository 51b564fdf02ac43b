"""Training tasks, one file each: what the loop calls to get a loss, previews and a model folder."""
