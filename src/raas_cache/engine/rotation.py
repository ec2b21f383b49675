"""The rotary embedding of a layer (RoPE): which components of a key form a pair, and how fast each pair rotates."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotates keys and queries by a number of positions. A key is seen as pairs of components.

    Args:
        first, second: `[pairs]` int64, the components of each pair. Together they are all components of a key.
        frequency: `[pairs]` float64, the angle of a pair for one position; 0 for a pair that is not rotated.
    """

    first: torch.Tensor
    second: torch.Tensor
    frequency: torch.Tensor

    @classmethod
    def standard(cls, head_dim: int, theta: float, device: torch.device) -> Rotation:
        """The rotation of Llama: component i is paired with component `i + head_dim / 2`, the base is `theta`."""
        first = torch.arange(head_dim // 2, device=device)
        return cls(first, first + head_dim // 2, theta ** (-2 * first.double() / head_dim))

    @classmethod
    def from_matrix(cls, matrix: torch.Tensor) -> Rotation:
        """The rotation whose matrix for one position is `matrix` `[head_dim, head_dim]`, up to a positive factor.

        Column i is the image of unit vector i.

        Raises:
            ValueError: the matrix does not rotate pairs of components.
        """
        size = len(matrix)
        off = matrix.abs().clone().fill_diagonal_(0)
        partner = off.argmax(0)  # [head_dim], the component that is mixed with component i
        partner[off.amax(0) == 0] = -1
        index = torch.arange(size, device=matrix.device)
        rotated = partner >= 0
        single = index[~rotated]
        first = index[rotated & (matrix[partner, index] > 0)]
        second = partner[first]
        first, second = torch.cat([first, single[::2]]), torch.cat([second, single[1::2]])
        if size % 2 or not torch.equal(torch.cat([first, second]).sort().values, index):
            raise ValueError("the matrix does not rotate pairs of components.")
        angle = torch.atan2(matrix[second, first].double(), matrix[first, first].double())
        return cls(first, second, angle)

    def sizes(self, states: torch.Tensor) -> torch.Tensor:
        """Length of each pair of `states` `[..., head_dim]`, `[..., pairs]` float64."""
        return torch.hypot(states[..., self.first].double(), states[..., self.second].double())

    def rotated(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`states` `[..., head_dim]` rotated by `positions` `[...]`, which may be negative, as float64."""
        angle = positions.double()[..., None] * self.frequency  # [..., pairs]
        return self._turned(states, angle.cos(), angle.sin())

    def averaged(self, states: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """Mean over `distances` `[n]` of `states` `[..., head_dim]` rotated by each distance, as float64."""
        angle = distances.double()[:, None] * self.frequency  # [n, pairs]
        return self._turned(states, angle.cos().mean(0), angle.sin().mean(0))

    def _turned(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = states[..., self.first].double(), states[..., self.second].double()
        turned = torch.zeros(states.shape, dtype=torch.float64, device=states.device)
        turned = turned.index_copy(-1, self.first, a * cos - b * sin)
        return turned.index_copy(-1, self.second, a * sin + b * cos)
