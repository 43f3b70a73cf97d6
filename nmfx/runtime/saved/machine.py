"""The machine on which the ways to compute a compiled model were chosen."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta

from nmfx.files.parsing import Count, Form, Text
from nmfx.runtime.kernel.library import load_kernel, loaded, processor


class Machine(Form, frozen=True):
    """Where choices were made.

    Attributes:
        processor: its name and what it can do, as the system says.
        vector: numbers in a vector of the kernel; 0 without a kernel.
        threads: that shared the work.
        torch: version of PyTorch.
    """

    processor: Annotated[str, Meta(max_length=1 << 16)]
    vector: Count
    threads: Count
    torch: Text

    @property
    def name(self) -> str:
        """The processor and its vectors, for people."""
        words = self.processor.partition(";")[0].rpartition(":")[2].strip() or "an unknown processor"
        return f"{words} ({f'vectors of {self.vector}' if self.vector else 'no kernel'})"

    def chooses_as(self, other: Machine) -> bool:
        """Whether what is fastest on one should be on the other."""
        return (self.processor, self.vector) == (other.processor, other.vector)


def this_machine() -> Machine:
    """The machine that this process runs on, with the kernel that it has."""
    vector = 0 if load_kernel() else loaded().vector_length
    return Machine(processor()[: 1 << 16], vector, torch.get_num_threads(), str(torch.__version__))
