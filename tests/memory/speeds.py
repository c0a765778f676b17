"""Speeds of machines that nobody measured, in round numbers."""

from pcscale.memory.speed import FORMATS, Speed

HOST_SPEED = Speed(
    name="2 threads of this host",
    on_gpu=False,
    train_flops={"float32": 1e11, "bfloat16": 5e9},
    sweep_flops={"float32": 2e11, "bfloat16": 1e10},
    update_seconds=dict(zip(FORMATS, (2e-9, 4e-9, 6e-9, 8e-9), strict=True)),
    bus=1e10,
    disk_read=2e9,
    disk_write=1e9,
)
GPU_SPEED = HOST_SPEED.model_copy(update={"name": "a GPU", "on_gpu": True})
