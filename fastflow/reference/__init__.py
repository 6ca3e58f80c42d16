"""Plain PyTorch implementations of every op: the truth that backends are checked against."""
