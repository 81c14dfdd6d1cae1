"""The list of names that the demo pipeline was trained on, from which its prompts are made.

python demos/train/concepts.py --data build/emoji --out demos/assets/emoji_concepts.json
"""

from __future__ import annotations

import json

from common import ask, load_emoji
from train_dit import GROUPS, STYLES

HEAD = {
    "about": "Names of the pictures the demo model was trained on, in Unicode order; styles: the sets that have one.",
    "license": "MIT",
    "source": "names and groups: emojibase-data, Copyright Miles Johnson, https://emojibase.dev (MIT)",
}


def main() -> None:
    args = ask(__doc__, None, "demos/assets/emoji_concepts.json").parse_args()
    concepts: dict[str, dict] = {}
    for about in load_emoji(args.data, STYLES, GROUPS).about:
        entry = concepts.setdefault(about["name"], {"name": about["name"], "group": about["group"], "styles": []})
        entry["styles"].append(about["style"])
    head = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in HEAD.items()]
    # One name per line, so that a change is a readable diff.
    lines = ",\n".join("  " + json.dumps(concept, ensure_ascii=False) for concept in concepts.values())
    args.out.write_text("\n".join(["{", *head, ' "concepts": [', lines, " ]", "}", ""]), encoding="utf-8")
    print(f"{len(concepts)} names in {args.out}")


if __name__ == "__main__":
    main()
