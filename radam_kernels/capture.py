"""Whether a step is being recorded instead of done."""

import torch


def is_capturing(device: torch.device | None = None) -> bool:
    """Whether the current stream of `device` (default: the current one) captures a CUDA graph."""
    if not torch.cuda.is_initialized():
        return False
    if device is None or device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
