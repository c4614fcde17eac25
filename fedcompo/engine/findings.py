"""What is known of a run before it starts: counts, faults, notes, and what it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fedcompo.errors import DataError

if TYPE_CHECKING:  # which loads timm
    from fedcompo.engine.estimate import Estimate

ADVICE = (
    "Mend this, or leave clients out with `exclude`. `--no-check` starts anyway, and leaves out in "
    "the run who cannot take part."
)
WHOSE = "Client "
"""How a fault of a client's own begins."""


@dataclass
class Preflight:
    """What is known of a run before it starts."""

    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: ``classes`` with the number of training and of test images, and what was checked."""
    total: int = 0
    """Number of clients; ``clients`` are fewer if time was short, or some have faults."""
    faults: list[str] = field(default_factory=list)
    """Why it cannot be used, each with what to do; empty: it can."""
    notes: list[str] = field(default_factory=list)
    backbone: dict[str, Any] = field(default_factory=dict)
    """Name, number of parameters and input of the backbone; empty: not loaded."""
    estimate: Estimate | None = None
    free: dict[str, int] = field(default_factory=dict)
    """Bytes free, of ``disk`` and ``memory``."""

    def values(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"usable": not self.faults, **asdict(self)}

    def require(self) -> Preflight:
        """Return this; raise ``DataError`` with all faults if there is one."""
        if self.faults:
            own = any(fault.startswith(WHOSE) for fault in self.faults)
            advice = ["Nothing was started.", *([ADVICE] if own else [])]
            raise DataError("\n".join([*self.faults, " ".join(advice)]))
        return self
