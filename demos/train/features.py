"""Features of the real pictures, which the Fréchet distance of the demo is measured against.

    python demos/train/features.py --data build/emoji --out demos/assets/emoji_features.safetensors

EfficientNet-Lite0 features (n, 1280) of every Noto and Fluent-flat picture that the demo pipeline was trained on,
float16, with the network's name and digest in the header. 913 pictures, one CPU minute.
"""

from __future__ import annotations

import torch
from common import ask, load_emoji

from qgen.eval.efficientnet_lite0 import EfficientNetLite0
from qgen.eval.extractors import save_features
from qgen.eval.images import batches

STYLES = ("noto", "flat")
GROUPS = ("animals", "food", "smileys")
ABOUT = "Noto Emoji (Apache-2.0) and Fluent Emoji flat (MIT), groups animals, food, smileys; see ATTRIBUTION.md"


def main() -> None:
    args = ask(__doc__, None, "demos/assets/emoji_features.safetensors").parse_args()
    emoji = load_emoji(args.data, STYLES, GROUPS)
    network = EfficientNetLite0()
    pictures = torch.from_numpy(emoji.pictures).float() / 255
    features = torch.cat([network.features(batch) for batch in batches(pictures, 32)])
    save_features(args.out, features, network, ABOUT)
    print(f"features {tuple(features.shape)} of {network.name} {network.digest} in {args.out}")


if __name__ == "__main__":
    main()
