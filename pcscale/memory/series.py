"""Memory over time in a bounded number of samples, however long a run is."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json, write_json

MAX_SAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """What was held at one time. Units: seconds since the run began, bytes.

    Attributes:
        host, device: by component.
    """

    seconds: float
    phase: str
    moment: str | None
    host: dict[str, int]
    device: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.host.values()) + sum(self.device.values())


class Series:
    """Samples in the order of time, the highest one of each stretch; stretches grow with the run.

    Args:
        samples: of an earlier part of the run.
    """

    def __init__(self, samples: list[Sample] | None = None) -> None:
        self.samples = samples or []
        self._stretch = self._left = 1
        """Samples that make one kept sample, and how many of them are still to come."""
        self._thin_out()

    @property
    def last_seconds(self) -> float:
        return self.samples[-1].seconds if self.samples else 0.0

    def add(self, sample: Sample) -> None:
        if self._left == self._stretch:
            self.samples.append(sample)
            self._thin_out()
        elif sample.total > self.samples[-1].total:
            self.samples[-1] = sample
        self._left = self._left - 1 or self._stretch

    def _thin_out(self) -> None:
        while len(self.samples) >= MAX_SAMPLES:
            pairs = [self.samples[first : first + 2] for first in range(0, len(self.samples), 2)]
            self.samples = [max(pair, key=lambda sample: sample.total) for pair in pairs]
            self._stretch *= 2
            self._left = self._stretch

    def write(self, path: Path) -> None:
        write_json(path, {"samples": [asdict(sample) for sample in self.samples]})

    @classmethod
    def read(cls, path: Path) -> "Series":
        """Go on with what `write` left; where there is nothing, an empty one.

        Raises:
            RequestError: the file is broken.
        """
        if not path.exists():
            return cls()
        document: Any = read_json(path)
        try:
            return cls([Sample(**sample) for sample in document["samples"]])
        except (KeyError, TypeError) as error:
            raise RequestError(f"{path} holds no samples of memory ({error}). Remove or restore the file.") from None
