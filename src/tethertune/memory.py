"""What a constraint costs in memory, and of what it consists."""

from dataclasses import dataclass

__all__ = ["Memory"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Memory:
    """Bytes in this process, of this rank alone where weights are sharded.

    Attributes:
        reference: The reference's own copy, beside the weights.
        host: The reference's own copy on the host, where the weights are on an accelerator.
        mapped: The part of a safetensors file that is mapped: the system's memory, shared by all processes that map
            the same file, and given back when something else needs it.
        tables: Radii and sizes of rows, and the tables of the kernels.
        scratch: What is kept between steps to compute in.
        passing: The most that a step, or :meth:`~tethertune.Constraint.distances`, takes besides for a moment.
    """

    reference: int
    host: int
    mapped: int
    tables: int
    scratch: int
    passing: int

    @property
    def peak(self) -> int:
        """The most that the constraint takes of this process's own memory at any time between and in steps."""
        return self.reference + self.host + self.tables + self.scratch + self.passing

    def __str__(self) -> str:
        named = {
            "reference": self.reference,
            "reference on the host": self.host,
            "tables": self.tables,
            "scratch": self.scratch,
            "for a moment in a step": self.passing,
        }
        parts = ", ".join(f"{readable(size)} {name}" for name, size in named.items() if size)
        mapped = f"; {readable(self.mapped)} mapped from a file" if self.mapped else ""
        return f"at most {readable(self.peak)}" + (f" ({parts})" if parts else "") + mapped


def readable(size: float) -> str:
    """A number of bytes in the unit in which it is at least 1: ``"1.5 MiB"``."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{size:.0f} B"
