"""More than one process, and ZeRO: the only package that imports deepspeed and torch.distributed."""
