"""The selective state-space model inside the Synapse router.

Source: specs/synapse.md, section 2.4. Unlike the seed's, the convolution's last inputs are
part of the state, so that one call of L tokens and L calls of one token agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus


class MambaState(NamedTuple):
    """`ssm` (B, N, S), and the convolution's last inputs `window` (B, d_conv - 1, N)."""

    ssm: Tensor
    window: Tensor


class Mamba(nn.Module):
    """`x` (B, T, d) → (B, T, d). `config` is that of the module `mamba`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = config["d_model"], config["d_inner"]
        self.n_state, self.rank, self.kernel = (
            config[key] for key in ("d_state", "dt_rank", "d_conv")
        )
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, self.kernel, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * self.n_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.a_log = nn.Parameter(torch.arange(1.0, self.n_state + 1).log().repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def new_state(self, rows: int, like: Tensor) -> MambaState:
        """Zeros, of the dtype and on the device of `like`."""
        inner = len(self.d)
        return MambaState(
            like.new_zeros(rows, inner, self.n_state), like.new_zeros(rows, self.kernel - 1, inner)
        )

    def forward(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """The outputs and the state after them."""
        ssm, window = state or self.new_state(len(x), x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        seen = torch.cat([window, u], dim=1)
        a = silu(conv1d(seen.mT, self.conv1d.weight, self.conv1d.bias, groups=u.shape[-1]).mT)
        r, b, c = self.x_proj(a).split([self.rank, self.n_state, self.n_state], dim=-1)
        dt = softplus(self.dt_proj(r))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.a_log))
        drive = (dt * a).unsqueeze(-1) * b.unsqueeze(2)
        outputs = []
        for step in range(x.shape[1]):
            ssm = decay[:, step] * ssm + drive[:, step]
            outputs.append((ssm * c[:, step, None]).sum(-1))
        y = torch.stack(outputs, dim=1) + self.d * a
        last = seen[:, x.shape[1] :]
        return self.out_proj(y * silu(z)), MambaState(ssm, last)
