r"""VQ4DiT: vectors of weights learn which codeword they take, and codewords where they lie, on the error of the output.

k-means gives each vector of d weights its nearest word, which fits the weights and not the outputs: vectors with opposite needs share a
word and pull it to and fro. So every vector keeps its n nearest words as candidates,

    ŵ = Σ_j r_j C[i_j],    r = softmax(z),    min  L(Ŵ) / L(k-means) + λ Σ n r (1 − r)

and z and C are learned together (RMSprop). A vector whose best r exceeds `freeze` is fixed to that word; what is left at the end goes to
the largest r, so that nothing but indices and the codebook is stored. With n = 1 only the codebook learns. L is the output error over all
calibration rows, by their second moment; the paper replays the float model without data for it, and takes whole blocks.
Deng et al., 2024, https://arxiv.org/abs/2408.17131
"""

__all__ = ["VQ4DiT"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.formats.vq import VectorQuantizer
from qgen.methods.base import Stats
from qgen.methods.gptq import hessian
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("vq4dit")
@dataclass(frozen=True)
class VQ4DiT:
    """Lowers the output error over all fitted rows; kept only where it lowers the error on held-out rows. For formats of one codebook
    (vq2_d4, vq3_d2, …); others pass.

    candidates: n. steps: of RMSprop. book_rate, ratio_rate: its rates for the codebook and for z. weight: λ. freeze: see above.
    """

    name: ClassVar[str] = "vq4dit"
    optional: ClassVar[bool] = True
    candidates: int = 2
    steps: int = 300
    book_rate: float = 0.003
    ratio_rate: float = 0.05
    weight: float = 0.1
    freeze: float = 0.99

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        fmt = formats.get(draft.spec.weight)
        if not isinstance(fmt, VectorQuantizer) or fmt.stages != 1:
            return draft
        start = fmt.quantize(draft.target(), draft.clip)
        code, moved = self._learn(fmt, draft.target(), start, hessian(draft, stats))
        return replace(draft, qweight=code).noted(moved=f"{moved:.1%}")

    def _learn(self, fmt: VectorQuantizer, target: Tensor, start: QTensor, gram: Tensor) -> tuple[QTensor, float]:
        """The learned tensor, and the share of vectors that left their nearest word."""
        scale = start.scales.float()
        book = start.global_scale.clone()
        vectors = fmt.normalize(target, start.scales, None, None).reshape(-1, fmt.dims)
        near = _nearest(vectors, book, self.candidates)  # (V, n), the nearest first
        z = torch.zeros(near.shape, device=target.device)
        fixed = torch.full((len(near),), -1, device=target.device)
        error = target - start.dequantize()
        first = max(float(((error @ gram) * error).sum()), 1e-30)
        squares = [torch.zeros_like(book), torch.zeros_like(z)]
        best, least = None, torch.inf
        for step in range(self.steps + 1):
            r = z.softmax(-1)
            hard = torch.nn.functional.one_hot(torch.where(fixed < 0, r.argmax(-1), fixed), near.shape[1]).float()
            if step % 10 == 0 or step == self.steps:  # what would be stored if learning ended here
                index = (near * hard.long()).sum(-1)
                error = target - book[index].view(target.shape) * scale
                if (loss := float(((error @ gram) * error).sum())) < least:
                    best, least = (index, book.clone()), loss
            r = torch.where(fixed[:, None] < 0, r, hard)
            words = book[near]  # (V, n, d)
            error = target - (r[..., None] * words).sum(1).view(target.shape) * scale
            pull = ((error @ gram).mul_(scale).mul_(-2 / first)).view(-1, 1, fmt.dims)  # ∂L/∂ŵ of each vector
            book_grad = torch.zeros_like(book).index_add_(0, near.flatten(), (r[..., None] * pull).flatten(0, 1))
            r_grad = (pull * words).sum(-1) + self.weight * near.shape[1] / len(near) * (1 - 2 * r)
            z_grad = r * (r_grad - (r * r_grad).sum(-1, keepdim=True))
            _rms_step(book, book_grad, squares[0], self.book_rate)
            if near.shape[1] > 1:
                _rms_step(z, torch.where(fixed[:, None] < 0, z_grad, 0.0), squares[1], self.ratio_rate)
                top, at = z.softmax(-1).max(-1)
                fixed = torch.where((fixed < 0) & (top > self.freeze), at, fixed)
        index, book = best
        codes = index.view(*target.shape[:-1], -1).to(torch.uint8)
        made = replace(start, codes=fmt.pack(codes), global_scale=book)
        return made, float((index != near[:, 0]).float().mean())


def _nearest(vectors: Tensor, book: Tensor, count: int) -> Tensor:
    """(V, n) indices of the nearest words, by |c|² − 2 v·c, in ascending order of distance."""
    half = book.square().sum(-1) / 2
    return torch.cat(
        [(half - part @ book.T).topk(min(count, len(book)), largest=False).indices for part in vectors.split(16384)]
    )


def _rms_step(x: Tensor, grad: Tensor, square: Tensor, rate: float, decay: float = 0.9) -> None:
    """RMSprop, in place; entries without any gradient stay."""
    square.mul_(decay).addcmul_(grad, grad, value=1 - decay)
    x.addcdiv_(grad, square.sqrt().add_(1e-20), value=-rate)
