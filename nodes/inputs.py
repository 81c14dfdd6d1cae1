"""Inputs that several nodes have: those of a sampling, as ComfyUI's KSampler names and bounds them, and the list of recipes."""

__all__ = ["recipe", "recipes", "sampling", "seed"]

from qgen.nodes.registry import Input


def recipe(tip: str) -> Input:
    """A choice among qgen's recipes."""
    return Input("recipe", "COMBO", tip, default="auto", choices=recipes)


def recipes() -> list[str]:
    """Names of all recipes, "auto" first."""
    from qgen.recipes import names

    return names()


def seed(tip: str, bits: int = 64, rolls: bool = False, advanced: bool = False) -> Input:
    """A seed of so many bits. rolls: whether the front end draws a new one after each run."""
    return Input("seed", "INT", tip, default=0, low=0, high=2**bits - 1, rolls=rolls, advanced=advanced)


def sampling(of: str, least: float = 0.0, advanced: bool = False) -> tuple[Input, ...]:
    """steps, cfg, sampler_name, scheduler, denoise. of: whose they are, for the tips. least: of denoise; advanced: whether it is folded."""
    return (
        Input("steps", "INT", f"Denoising steps of {of}.", default=20, low=1, high=1000),
        Input("cfg", "FLOAT", f"Guidance scale of {of}.", default=1.0, low=0.0, high=100.0, step=0.1),
        Input("sampler_name", "COMBO", f"Sampler of {of}, as in KSampler.", default="euler", choices=_samplers),
        Input("scheduler", "COMBO", f"Scheduler of {of}, as in KSampler.", default="simple", choices=_schedulers),
        Input(
            "denoise",
            "FLOAT",
            f"Share of the schedule that {of} goes through; 1 starts from pure noise.",
            default=1.0,
            low=least,
            high=1.0,
            step=0.01,
            advanced=advanced,
        ),
    )


def _samplers() -> list[str]:
    from comfy.samplers import KSampler

    return list(KSampler.SAMPLERS)


def _schedulers() -> list[str]:
    from comfy.samplers import KSampler

    return list(KSampler.SCHEDULERS)
