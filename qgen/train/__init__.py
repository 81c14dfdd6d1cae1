"""Fine-tuning of a quantized model by its 16-bit teacher: no data but prompts and noise.

    fake        rounding in the forward pass, a straight line in the backward pass
    twin        one packed layer with trainable parts in place of its codes, and back; student: all layers of a denoiser
    distill     the teacher's calls, which of them a step takes, how far the student is from them
    loop        steps, held-out checks, progress on disk; features, what is compared inside the models beside their outputs
    blocks      the other way: block by block, each by its own output (units, cases, fit, rounding, drop)
    base        what a method is; each method is one file beside it

`qgen.finetune(pipe, teacher)` leaves an ordinary packed pipeline: the same slots in every layer, other numbers.
"""

from qgen.train.base import Tuning, tunings

__all__ = ["Tuning", "tunings"]
