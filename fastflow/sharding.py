"""Flows under FSDP2, PyTorch's sharding of parameters over processes."""

from __future__ import annotations

from torch import nn

METHODS = ("inverse", "log_prob", "sample", "rsample", "rsample_and_log_prob")


def register_fsdp_methods(module: nn.Module) -> None:
    """Makes FSDP2 gather the parameters for every direction of a flow, not for `forward` alone.

    `torch.distributed.fsdp.fully_shard` leaves its modules with a shard of their parameters, and
    gathers them around `forward`. Call this once all modules are sharded: it registers the other
    methods of flows and bijections with `torch.distributed.fsdp.register_fsdp_forward_method`.
    Flows, bijections and modules that hold them may be sharded, the `nn.Linear` within them not.

    Arguments:
        module: holds the flows and bijections, or is one. Those that are not sharded are left
            alone.

    Example:
        >>> flow = MAF(3)
        >>> register_fsdp_methods(flow)  # of one process: nothing is sharded
    """
    from torch.distributed.fsdp import register_fsdp_forward_method  # a slow import

    for part in module.modules():
        for name in METHODS:
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)
