"""The frozen base, straight from its safetensors files: mapped, checked when first read, never held."""

from collections.abc import Mapping

import torch

from pcscale.base.checks import read_base_entries
from pcscale.base.resolve import BaseFolder
from pcscale.base.weight import FrozenWeight
from pcscale.common.errors import RequestError
from pcscale.families.hf_config import read_config
from pcscale.families.registry import family_of
from pcscale.storage.hashing import fingerprint
from pcscale.storage.reader import TensorReader


class MappedBase:
    """A base checkpoint whose weights are read from disk as they are needed.

    Every tensor is checked when it is first read: it must be finite, and have its fingerprint in `expected` where that
    names one. Checking in passing costs no second pass over the files.

    Args:
        expected: fingerprints by tensor name that the base must have.

    Raises:
        RequestError: the folder is no usable checkpoint of a supported family.

    Memory: file-backed only.
    """

    placement = "disk"
    collective = False

    def __init__(self, source: BaseFolder, expected: Mapping[str, str] | None = None) -> None:
        self.folder, self.name, self.revision = source.folder, source.name, source.revision
        self.config = read_config(self.folder)
        self.family = family_of(self.config, str(self.folder / "config.json"))
        self.num_layers: int = self.config["num_hidden_layers"]
        self.weights = tuple(self.family.weights(self.config))
        self.matrix_names = [weight.name for weight in self.weights if weight.kind.is_matrix]
        """The names that `weight` takes."""
        self._reader = TensorReader(read_base_entries(self.folder, self.family, self.config))
        self.fingerprints: dict[str, str] = {}
        """Fingerprints of the tensors read so far, by name."""
        self.expect(expected or {})
        self.coded_fingerprints: dict[str, str] = {}  # It has no 8-bit codes.

    @property
    def stored(self) -> "MappedBase":
        """The checkpoint itself, as every base names the one that it comes from."""
        return self

    def dtype(self, name: str) -> str:
        """The stored dtype, in the safetensors format's spelling."""
        return self._reader.entries[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of one base weight on the host, in its stored dtype.

        Raises:
            RequestError: the weight is not finite, or not the one that the run began with.
        """
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._reader.tensor(name)
        if name in self.fingerprints:
            return tensor
        found = fingerprint(self._reader.data(name))
        self._compare(name, found)
        # A matching fingerprint was finite when it was taken. The smallest and largest entry show any NaN or infinity.
        if name not in self._expected and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
            raise RequestError(
                f"{self._reader.entries[name].file}: {name} holds NaN or infinity. Fetch or copy the file again."
            )
        self.fingerprints[name] = found
        return tensor

    def weight(self, name: str) -> FrozenWeight:
        """One base matrix as the sweep reads it, on the host."""
        return FrozenWeight(self.tensor(name))

    def lost(self, name: str, rows: slice) -> torch.Tensor | None:
        """The rows less `weight`'s: None, since nothing is rounded."""
        return None

    def _compare(self, name: str, found: str) -> None:
        expected = self._expected.get(name, found)
        if expected != found:
            raise RequestError(
                f"{self._reader.entries[name].file}: {name} is not the weight {self._expected_by} "
                f"(fingerprint {found[:12]}…, expected {expected[:12]}…). Use the same base and revision."
            )

    def expect(self, fingerprints: Mapping[str, str], by: str = "this checkpoint was trained on") -> None:
        """Demand these fingerprints of this base from now on; `by` ends a refusal: "… is not the weight `by`".

        Raises:
            RequestError: a weight that was read already is another one.
        """
        self._expected, self._expected_by = dict(fingerprints), by
        for name, found in self.fingerprints.items():
            self._compare(name, found)

    def layer_names(self, layer: int | None) -> list[str]:
        """The names of one layer's tensors; None: of those outside the layers."""
        return [weight.name for weight in self.weights if weight.layer == layer]

    def prefetch(self, names: list[str]) -> None:
        """Have the operating system read these tensors ahead; returns at once."""
        self._reader.prefetch(names)

    def check_all(self) -> dict[str, str]:
        """Read all tensors that were not read yet; returns every tensor's fingerprint."""
        for weight in self.weights:
            self._read(weight.name)
        return self.fingerprints
