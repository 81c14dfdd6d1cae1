r"""TopKLD: distillation of generators that draw tokens: what the teacher's K likeliest tokens share, and what the rest does, weighed apart.

With p the teacher's distribution, q the student's, S the teacher's top K, P and Q the mass of S under each:

    KL(p‖q) = kl₂(P‖Q) + P · KL(p_S‖q_S) + (1 − P) · KL(p_rest‖q_rest)                  (the chain rule, exact)
    loss    = kl₂(P‖Q) + a · P · KL(p_S‖q_S) + b · (1 − P) · KL(p_rest‖q_rest)

a = b = 1 is plain KL; b < 1 cares less about tokens that are never drawn. The split is the teacher's alone, so the student cannot game it.
The paper says that it balances explicit (top-K) and implicit knowledge and gives no code: this form is our reading of it.
Bit-level scaling laws, 2025, https://arxiv.org/abs/2501.06218
"""

__all__ = ["TopKLD", "topk_kl"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.train.base import tunings
from qgen.train.full import Full


def topk_kl(teacher: Tensor, student: Tensor, k: int, a: float = 1.0, b: float = 1.0, reverse: bool = False) -> Tensor:
    """(…,) loss of logits (…, V), float32, in nats. k: of the V tokens; k >= V leaves no rest. reverse: KL(q_rest‖p_rest) for the rest."""
    vocabulary = teacher.shape[-1]
    log_p, log_q = torch.log_softmax(teacher.detach().float(), -1), torch.log_softmax(student.float(), -1)
    if k >= vocabulary:
        return a * (log_p.exp() * (log_p - log_q)).sum(-1)
    top = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, log_p.topk(k, -1).indices, True)

    def part(inside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log mass of a part under p and q, and the logs of p and q within it, 0 outside."""
        p, q = (t.masked_fill(~inside, -torch.inf) for t in (log_p, log_q))
        mass_p, mass_q = p.logsumexp(-1), q.logsumexp(-1)
        return (
            mass_p,
            mass_q,
            (log_p - mass_p[..., None]).masked_fill(~inside, 0),
            (log_q - mass_q[..., None]).masked_fill(~inside, 0),
        )

    top_p, top_q, p_s, q_s = part(top)
    rest_p, rest_q, p_r, q_r = part(~top)
    two = top_p.exp() * (top_p - top_q) + rest_p.exp() * (rest_p - rest_q)
    within = (p_s.exp() * (p_s - q_s)).masked_fill(~top, 0).sum(-1)
    outer = q_r.exp() * (q_r - p_r) if reverse else p_r.exp() * (p_r - q_r)
    beside = outer.masked_fill(top, 0).sum(-1)
    return two + a * top_p.exp() * within + b * rest_p.exp() * beside


@tunings.register("topkld")
@dataclass(frozen=True)
class TopKLD(Full):
    """Trains what `full` does, by the distance above between logits (B, tokens, V). k: tokens that are known explicitly. a, b, reverse: see
    `topk_kl`."""

    k: int = 64
    a: float = 1.0
    b: float = 0.1
    reverse: bool = False

    name = "topkld"

    def distance(self, got: Tensor, want: Tensor) -> Tensor:
        return topk_kl(want, got, self.k, self.a, self.b, self.reverse).flatten(1).mean(1)
