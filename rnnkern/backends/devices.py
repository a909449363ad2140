"""What all GPU backends ask of the devices that are here."""

from __future__ import annotations

from functools import cache

import torch

#: Compute capability of NVIDIA's GPUs: the first with tensor cores for bfloat16 and TF32.
LEAST_CAPABILITY = (8, 0)


@cache
def too_old() -> str | None:
    """Why no kernel serves this machine's GPUs, if one of those that torch sees is too old for them; None if not."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if capability < LEAST_CAPABILITY:
            found, least = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
            return (
                f"GPU {i} ({torch.cuda.get_device_name(i)}) has compute capability {found}, and {least} or later is "
                "needed (CUDA_VISIBLE_DEVICES hides a GPU)"
            )
    return None
