import math

import torch
from torch import nn
from torch.nn import functional as F


def angles_of(n, dim):
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(1e4) / (dim // 2)))
    phase = n.float().unsqueeze(-1) * rates
    return torch.cat((torch.cos(phase), torch.sin(phase)), dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_rms, self.k_rms = nn.RMSNorm(dim // n_head), nn.RMSNorm(dim // n_head)

    def forward(self, h):
        q, k, v = (z.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for z in self.wqkv(h).chunk(3, -1))
        out = F.scaled_dot_product_attention(self.q_rms(q), self.k_rms(k), v)
        return self.wo(out.transpose(1, 2).flatten(2))


class CaptionAttention(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=i == 3) for i in range(4))

    def forward(self, h, words):
        pairs = ((self.wq, h), (self.wk, words), (self.wv, words))
        q, k, v = (w(z).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for w, z in pairs)
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv_2(F.silu(self.conv_1(x)))
