"""What lies on disk: whole files and directories, hashes, spilled hidden states, checkpoints, the cache."""
