"""One torch.autograd.Function per op: it saves tensors, backends do the mathematics."""
