"""Quantization Report: one bar per layer, as a picture and as text, for whatever the nodes of qgen have quantized.

    error = 10^(−SQNR / 20)      RMS of a layer's output error relative to its float output; of its weights where no output was measured

Rows come from where the quantizing node left them: the `qgen_report` of a denoiser, of a text encoder, of a decoder or of a pipeline.
"""

__all__ = ["chart", "report", "rows_of"]

from typing import Any

from qgen.nodes import registry
from qgen.nodes.images import from_pil, stacked, text_picture
from qgen.nodes.registry import Input, Node, Output, Result

ORDERS = ("worst first", "model order")
ATTACHED = (
    "qgen_report"  # name of the attachment on ComfyUI's patchers: a list of rows as `qgen.show.rows.build` takes them
)
_INK, _FADED, _PAPER, _RULE = (24, 24, 27), (113, 113, 122), (255, 255, 255), (228, 228, 233)
_HELD, _FIT, _WEIGHT = (37, 99, 235), (147, 180, 247), (217, 119, 6)


def rows_of(thing: Any) -> Any:
    """`qgen.show.rows.Summary` of a MODEL, CLIP, VAE or pipeline. ValueError if nothing in it was quantized by qgen."""
    from qgen.errors import NotQuantizable
    from qgen.show.rows import gather

    patcher = getattr(thing, "patcher", thing)
    whole = patcher.model if hasattr(patcher, "model_options") else thing
    try:
        return gather(getattr(whole, "diffusion_model", whole))
    except NotQuantizable as error:
        raise ValueError(
            "model: nothing in it was quantized by qgen; connect the output of Quantize Model, Load Quantized Model, Quantize CLIP, "
            "Quantize VAE or Quantize Diffusers Pipeline"
        ) from error


def chart(found: Any, order: str = ORDERS[0], most: int = 40, width: int = 1100) -> Any:
    """A PIL picture: a bar of relative error per quantized layer, with its SQNR in dB, its format and the method chain's last word."""
    from PIL import Image, ImageDraw, ImageFont

    from qgen.show.sections import error

    rows = [row for row in found if row["spec"] != "float"]
    judged = [(row, row["sqnr_db"] if row["sqnr_db"] is not None else row["weight_sqnr_db"]) for row in rows]
    if order == ORDERS[0]:
        judged.sort(key=lambda item: float("inf") if item[1] is None else item[1])
    left_out = max(0, len(judged) - most)
    judged = judged[:most]
    top = max((error(db) for _, db in judged if db is not None), default=1.0) or 1.0
    big, font = ImageFont.load_default(20), ImageFont.load_default(14)
    step, head, names, numbers = 24, 92, 360, 250
    canvas = Image.new("RGB", (width, head + step * max(len(judged), 1) + 16), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((16, 12), "Error of every quantized layer", _INK, big)
    draw.text(
        (16, 42), f"RMS error relative to the float layer; the longest bar is {100 * top:.2g} %; {order}.", _FADED, font
    )
    legend = (("outputs, held-out calls", _HELD), ("outputs, fitted calls", _FIT), ("weights alone", _WEIGHT))
    x = 16.0
    kinds = {
        _HELD: any(row["sqnr_db"] is not None for row, _ in judged),
        _WEIGHT: any(row["sqnr_db"] is None for row, _ in judged),
    }
    kinds[_FIT] = any(row["sqnr_db"] is not None and row["sqnr_fit_db"] is not None for row, _ in judged)
    for words, colour in ((words, colour) for words, colour in legend if kinds[colour]):
        draw.rectangle((x, 70, x + 12, 82), colour)
        draw.text((x + 18, 67), words, _FADED, font)
        x += font.getlength(words) + 48
    room = width - names - numbers - 32
    for number, (row, db) in enumerate(judged):
        y = head + step * number
        draw.line((16, y, width - 16, y), _RULE)
        draw.text((16, y + 3), _short(row["path"], font, names - 16), _INK, font)
        if db is None:
            draw.text((names + 16, y + 3), "not measured", _FADED, font)
            continue
        colour = _WEIGHT if row["sqnr_db"] is None else _HELD
        draw.rectangle((names + 16, y + 4, names + 16 + max(1, room * error(db) / top), y + 15), colour)
        if row["sqnr_db"] is not None and row["sqnr_fit_db"] is not None:
            draw.rectangle(
                (names + 16, y + 17, names + 16 + max(1, room * error(row["sqnr_fit_db"]) / top), y + 20), _FIT
            )
        draw.text((width - numbers, y + 3), f"{db:5.1f} dB   {row['spec']}", _INK, font)
    if left_out:
        draw.text((16, canvas.height - 18), f"and {left_out} more layers", _FADED, font)
    return canvas


def report(model: Any, order: str = ORDERS[0], layers: int = 40) -> Result:
    """The chart with totals below as IMAGE, and the same as text."""
    from qgen.show.summary import total_lines

    found = rows_of(model)
    lines = total_lines(found.totals)
    text = "\n".join([*lines, "", *(_line(row) for row in found)])
    picture = chart(found, order, layers)
    board = stacked(picture, text_picture(lines, width=picture.width, headline=False))
    return Result((from_pil(board), text), {"text": [text]})


def _line(row: dict) -> str:
    from qgen.show.summary import quality

    return f"{row['path']}  {row['spec']}  {quality(row)}  {row['why']}".rstrip()


def _short(path: str, font: Any, width: int) -> str:
    """The path with its beginning cut off where it is too long: the end tells layers apart."""
    if font.getlength(path) <= width:
        return path
    while path and font.getlength("…" + path) > width:
        path = path[1:]
    return "…" + path


registry.register(
    Node(
        "QGenReport",
        "Quantization Report (qgen)",
        "Draws the error of every quantized layer as a picture and lists all layers as text: format, error, and why it is what it is.",
        run=report,
        inputs=(
            Input("model", "MODEL,CLIP,VAE,QGEN_PIPELINE", "What a node of qgen has quantized or loaded."),
            Input(
                "order", "COMBO", "Worst layers first, or in the order of the model.", default=ORDERS[0], choices=ORDERS
            ),
            Input("layers", "INT", "How many layers to draw; the text lists all.", default=40, low=1, high=400),
        ),
        outputs=(
            Output("IMAGE", "plot", "The error of each layer, and totals."),
            Output("STRING", "text", "All layers and totals as text."),
        ),
        search=("error", "sqnr", "layers", "summary", "plot", "statistics"),
        ends=True,
        category="qgen/inspect",
    )
)
