"""Named references: earlier states of the trained weights that a policy can be compared with, and draw with.

The reference of most methods is what training started from. SePPO's is a random earlier checkpoint, D3PO's with people
the last round. `References` keeps such states by name, in memory and in `references/` of the run's folder, so that a
run that was killed finds them again. One of them is in use at any time; policy, trainer and source see the same one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffalign.policy import Policy
from diffalign.resumable import write_atomically

__all__ = ["INITIAL", "References"]

INITIAL = "initial"
"""Name of the state that training started from; it is always there."""


class References:
    """Earlier states of a policy's trained weights, by name.

    Args:
        policy: Whose weights they are.

    Attributes:
        current: Name of the state that the policy's reference has now.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.current = INITIAL
        self._folder: Path | None = None
        self._states: dict[str, dict[str, Tensor]] = {}

    def begin(self, folder: Path) -> None:
        """Tells where the run writes; states that were kept there earlier can be used again."""
        self._folder = folder / "references"

    def keep(self, name: str) -> None:
        """Remembers the trained weights as they are now; every process calls it, the first one writes.

        A state that was kept under this name before is replaced: a resumed run passes the same steps again.
        """
        if name == INITIAL:
            raise ValueError(f"{INITIAL!r} is what training started from and cannot be replaced")
        state = self.policy.trained_state()
        if self._folder is not None:
            self._states.clear()  # the earlier ones are in their files: every process has taken steps since
        self._states[name] = state
        if self._folder is not None and int(os.environ.get("RANK", "0")) == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{name}.safetensors", save(state))

    def use(self, name: str) -> None:
        """Makes the policy's reference this state.

        Raises:
            ValueError: If no state of this name was kept, here or in the run's folder, or its file is damaged.
        """
        self.policy.put_reference(None if name == INITIAL else self._state(name))
        self.current = name

    def fingerprint(self, name: str) -> str:
        """A hash of a state's weights; of the initial one, its name.

        Raises:
            ValueError: As `use`.
        """
        if name == INITIAL:
            return INITIAL
        return hashlib.blake2b(save(self._state(name)), digest_size=16).hexdigest()

    def drop(self, name: str) -> None:
        """Forgets a state that is in use no more, its file included."""
        self._states.pop(name, None)
        if self._folder is not None and int(os.environ.get("RANK", "0")) == 0:
            (self._folder / f"{name}.safetensors").unlink(missing_ok=True)

    def _state(self, name: str) -> dict[str, Tensor]:
        if name not in self._states:
            path = (self._folder or Path("references")) / f"{name}.safetensors"
            if self._folder is None or not path.is_file():
                raise ValueError(f"reference {name!r} was not kept: {path} is missing; start the run anew")
            try:
                return load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is not a readable safetensors file ({error}); start the run anew") from error
        return self._states[name]
