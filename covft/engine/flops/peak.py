"""What GPUs can do at most."""

from __future__ import annotations

import re

#: Dense bf16 matrix products, TFLOP/s, from NVIDIA's and AMD's data sheets (where a sheet gives
#: the figure with structured sparsity, half of it), by what identifies the device's name.
#: The first match counts. A device is what PyTorch takes for one: half of an MI250X.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bB100\b", 1750.0),
    (r"\bH200 NVL\b", 835.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\b(GH200|H200|H100|H800)\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\b(A100|A800)\b", 312.0),
    (r"\bA30\b", 165.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX 6000 Ada\b", 364.2),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
    (r"\bMI300X\b", 1307.4),
    (r"\bMI250X\b", 191.5),
)


def peak_tflops(name: str) -> float | None:
    """Return a GPU's peak in dense bf16 matrix products, TFLOP/s, or None if it isn't listed.

    A slice of a GPU (MIG) has a share of the peak that its name doesn't tell exactly: None.

    Args:
        name: As ``torch.cuda.get_device_name()`` gives it.
    """
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)
