"""A small built-in prompt set for calibration: 128 captions composed from varied subjects, settings and styles, in our own words."""

__all__ = ["PROMPTS"]

_SUBJECTS = (
    "a lighthouse keeper", "two red foxes", "a bowl of ramen", "an old steam locomotive", "a ballet dancer", "a stack of books",
    "a hummingbird", "a rainy street market", "a glass teapot", "a mountain climber", "a sleeping cat", "a vintage bicycle",
    "a field of tulips", "a robot gardener", "a wooden violin", "a snowy village",
)  # fmt: skip
_SETTINGS = (
    "at dawn, soft light", "under neon signs", "in a quiet library", "by the sea in a storm", "on a white background",
    "in deep forest fog", "seen from above", "in a sunlit kitchen",
)  # fmt: skip
_STYLES = (
    "photograph, 35mm", "watercolor", "oil painting", "flat vector illustration", "pencil sketch", "3d render",
    "macro photograph, shallow focus", "woodcut print",
)  # fmt: skip

PROMPTS: tuple[str, ...] = tuple(
    f"{subject} {_SETTINGS[(i + j) % len(_SETTINGS)]}, {_STYLES[(3 * i + j) % len(_STYLES)]}"
    for j in range(8)
    for i, subject in enumerate(_SUBJECTS)
)
