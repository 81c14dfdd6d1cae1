"""The nodes on a real, unmodified ComfyUI server, over HTTP: what a user's graph would do, with small random models on the CPU.

The checkout lies in the server's custom_nodes as a clone would. The distance of a cosine from 1 may be a third larger than what was
measured; a wrong scale, order or sign falls far below.
"""

import time

import pytest
import torch

from tests import comfy_server
from tests.nodes import graphs
from tests.nodes.graphs import cosine, latent, loader, node, sampler

WHERE = comfy_server.asked()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(WHERE, str), reason=WHERE if isinstance(WHERE, str) else ""),
]
OURS = {
    *("QGenQuantizeModel", "QGenSaveModel", "QGenLoadModel", "QGenAttention", "QGenQuantizeCLIP", "QGenQuantizeVAE"),
    *("QGenCompare", "QGenReport", "QGenLoadPipeline", "QGenQuantizePipeline", "QGenSamplePipeline"),
}


def quantize(model=("m", 0), form="auto", recipe="rtn-int4", calibrated=False, **changed):
    told = {"recipe": recipe, "format": form, "rank": -1, "calibration": "auto", "seed": 0, "steps": 2, "cfg": 1.0}
    told |= {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "runs": 1}
    told |= {"budget": "", "attention": "as it is"}
    if calibrated:
        told |= {"positive": ["c", 0], "latent": ["l", 0]}
    return {"q": node("QGenQuantizeModel", model=list(model), **(told | changed))}


def save(name, form="qgen", folder="qgen", model=("q", 0)):
    return {"save": node("QGenSaveModel", model=list(model), name=name, format=form, folder=folder, overwrite=True)}


@pytest.fixture(scope="module")
def plain(server):
    """Latents of the 16-bit models."""
    return {
        name: latent(server, {**loader(name), **sampler(["m", 0], sixteen=name == graphs.FLUX)})
        for name in (graphs.FLUX, graphs.UNET)
    }


def test_every_node_is_listed_and_says_what_its_inputs_and_outputs_are(server):
    info = server.ask("/object_info")
    assert {name for name in info if name.startswith("QGen")} == OURS
    for name in sorted(OURS):
        alone = server.ask(f"/object_info/{name}")[name]
        assert alone["description"] and alone["category"].startswith("qgen") and alone["search_aliases"], name
        assert len(alone["output_tooltips"]) == len(alone["output"]) and all(alone["output_tooltips"]), name
        for group in ("required", "optional"):
            for field, (_, told) in alone["input"].get(group, {}).items():
                assert told.get("tooltip"), f"{name}.{field}"


# Least cosine with the latent of the 16-bit model: (Flux, UNet).
FLOORS = {
    "W4A4 int4": (0.9988, 0.978),
    "W4A4 nvfp4": (0.9989, 0.982),
    "W4A4 mxfp4": (0.9987, 0.981),
    "W4A8 int": (0.999, 0.993),
    "W4A16 uint4": (0.9989, 0.994),
    "W8A8 int8": (0.9991, 0.9992),
    "W8A8 fp8": (0.9991, 0.9975),
}


@pytest.mark.parametrize("form", FLOORS)
@pytest.mark.parametrize("name", [graphs.FLUX, graphs.UNET], ids=["flux", "unet"])
def test_a_quantized_model_draws_what_the_plain_one_draws_saved_and_loaded_bit_for_bit(server, plain, name, form):
    sixteen = name == graphs.FLUX
    file = f"{name.partition('.')[0]}-{form.replace(' ', '-')}"
    made = latent(server, {**loader(name), **quantize(form=form), **sampler(["q", 0], sixteen=sixteen), **save(file)})
    loaded = {"m": node("QGenLoadModel", file=f"{file}.safetensors", dtype="auto")}
    again = latent(server, {**loaded, **sampler(["m", 0], sixteen=sixteen)})
    found = cosine(made, plain[name])
    print(f"cosine {name} {form}: {found:.5f}")
    assert FLOORS[form][not sixteen] < found < 1
    assert torch.equal(made, again)


# The same of files that the stock loader opens: (Flux, UNet), whose convolutions they hold as floats.
STOCK = {
    "ComfyUI: nvfp4": (0.999, 0.988),
    "ComfyUI: mxfp8": (0.999, 0.9875),
    "ComfyUI: fp8": (0.999, 0.9885),
    "ComfyUI: int8": (0.999, 0.988),
    "ComfyUI: convrot_w4a4": (0.9984, 0.971),
    "ComfyUI: as exact as possible": (0.999, 0.988),
}


@pytest.mark.parametrize("form", STOCK)
@pytest.mark.parametrize("name", [graphs.FLUX, graphs.UNET], ids=["flux", "unet"])
def test_the_stock_loader_opens_what_was_exported(server, plain, name, form):
    sixteen = name == graphs.FLUX
    file = f"stock-{name.partition('.')[0]}-" + form.rpartition(": ")[2].replace(" ", "-")
    server.run({**loader(name), **quantize(form="W4A4 nvfp4"), **save(file, form, "diffusion_models")})
    stock = latent(server, {**loader(f"{file}.safetensors"), **sampler(["m", 0], sixteen=sixteen)})
    found = cosine(stock, plain[name])
    print(f"cosine stock {name} {form}: {found:.5f}")
    assert STOCK[form][not sixteen] < found < 1


@pytest.mark.parametrize(
    "name,lora", [(graphs.FLUX, graphs.LORA), (graphs.UNET, graphs.UNET_LORA)], ids=["flux", "unet"]
)
def test_a_lora_does_to_the_quantized_model_what_it_does_to_the_plain_one(server, plain, name, lora):
    sixteen = name == graphs.FLUX

    def drawn(before, strength):
        wear = {"w": node("LoraLoaderModelOnly", model=[before, 0], lora_name=lora, strength_model=strength)}
        return latent(
            server, {**loader(name), **quantize(form="W4A16 uint4"), **wear, **sampler(["w", 0], sixteen=sixteen)}
        )

    base = latent(server, {**loader(name), **quantize(form="W4A16 uint4"), **sampler(["q", 0], sixteen=sixteen)})
    float_lora, packed_lora = drawn("m", 1.0), drawn("q", 1.0)
    assert torch.equal(drawn("q", 0.0), base)
    change, wanted = packed_lora - base, float_lora - plain[name]
    print(f"lora {name}: {cosine(change, wanted):.4f}, {float(wanted.norm() / plain[name].norm()):.3f}")
    assert float(wanted.norm()) > 0.02 * float(plain[name].norm()), "the LoRA of this test does nothing"
    assert cosine(change, wanted) > 0.8
    assert torch.equal(
        latent(server, {**loader(name), **quantize(form="W4A16 uint4"), **sampler(["q", 0], sixteen=sixteen)}), base
    )


def test_a_calibration_that_is_stopped_leaves_server_and_model_as_they_were(server, plain):
    graph = {**loader(graphs.FLUX), **quantize(recipe="w4a8", calibrated=True, runs=16, steps=8), **sampler(["q", 0])}
    number = server.queue(graph)
    end = time.monotonic() + 60
    while time.monotonic() < end and not server.ask("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(2.0)
    began = time.monotonic()
    server.post("/interrupt")
    with pytest.raises(comfy_server.Interrupted):
        server.wait(number)
    assert time.monotonic() - began < 30
    plain_again = latent(server, {**loader(graphs.FLUX), **sampler(["m", 0], seed=2)})
    fresh = latent(server, {**loader(graphs.FLUX), **sampler(["m", 0])})
    assert torch.equal(fresh, plain[graphs.FLUX]) and not torch.equal(plain_again, fresh)


def test_a_calibrated_model_is_closer_than_a_rounded_one(server, plain):
    rounded = latent(server, {**loader(graphs.FLUX), **quantize(form="W4A4 int4"), **sampler(["q", 0])})
    graph = {**loader(graphs.FLUX), **quantize(recipe="svdquant-int4", calibrated=True), **sampler(["q", 0])}
    better = latent(server, graph, patience=600)
    print(f"rounded {cosine(rounded, plain[graphs.FLUX]):.5f}, calibrated {cosine(better, plain[graphs.FLUX]):.5f}")
    assert cosine(better, plain[graphs.FLUX]) > cosine(rounded, plain[graphs.FLUX])


BAD = {
    "recipe": quantize(recipe="svdqant"),
    "rank": quantize(rank=-7),
    "steps": quantize(steps=0),
    "sampler_name": quantize(sampler_name="oiler"),
    "format": quantize(form="int5"),
    "budget": quantize(budget="4.5"),
    "attention": quantize(attention="int3"),
    "calibration": quantize(calibration="perhaps"),
    "name": {**quantize(), **save("../outside")},
    "folder": {**quantize(), **save("fine", folder="loras")},
    "file": {"q": node("QGenLoadModel", file="../../outside.safetensors", dtype="auto")},
    "pipeline": {
        "p": node("QGenLoadPipeline", pipeline="../outside", dtype="float32"),
        "r": node("QGenReport", model=["p", 0], order="worst first", layers=5),
    },
}


@pytest.mark.parametrize("field", BAD)
def test_a_wrong_input_is_refused_before_it_is_queued_and_named(server, field):
    graph = {**loader(graphs.FLUX), **BAD[field]}
    if not {"save", "r"} & set(
        graph
    ):  # those end by themselves; ComfyUI takes a prompt of which some other end is right
        graph |= sampler(["q", 0])
    status, text = server.refused(graph)
    assert status == 400
    assert f'"input_name": "{field}"' in text or f"{field}:" in text, text


def test_a_pack_that_patches_attention_and_the_wrapper_goes_on_working(server):
    def drawn(scale, model):
        patch = {"o": node("OtherPackPatch", model=[model, 0], scale=scale)}
        return latent(
            server, {**loader(graphs.UNET), **quantize(form="W8A8 int8"), **patch, **sampler(["o", 0], sixteen=False)}
        )

    plain, packed = drawn(1.0, "m"), drawn(1.0, "q")
    changed, packed_changed = drawn(0.5, "m"), drawn(0.5, "q")
    assert float((changed - plain).norm() / plain.norm()) > 0.01
    assert cosine(packed_changed - packed, changed - plain) > 0.95


def test_fifty_prompts_leave_memory_where_it_was_and_equal_prompts_equal(server):
    first, resident = {}, []
    forms = ("W4A16 uint4", "W8A8 int8")
    for number in range(50):
        form, strength = forms[number % 2], (0.0, 0.5, 1.0)[number % 3]
        wear = {"w": node("LoraLoaderModelOnly", model=["q", 0], lora_name=graphs.LORA, strength_model=strength)}
        # The prefix differs from prompt to prompt, or ComfyUI would not run the sampler's successors again; the sampler's seed returns.
        graph = {**loader(graphs.FLUX), **quantize(form=form), **wear, **sampler(["w", 0], seed=number % 3)}
        graph["out"]["inputs"]["filename_prefix"] = f"fifty-{number}"
        made = latent(server, graph)
        assert torch.equal(first.setdefault((form, strength), made), made), number
        resident.append(server.memory())
    print("resident MB", [m >> 20 for m in resident[::7]])
    assert len(first) == 6
    assert "Potential memory leak" not in server.said()
    assert resident[-1] < 1.05 * resident[4]


def test_compare_and_report_show_pictures_and_tables(server):
    told = {"positive": ["c", 0], "negative": ["c", 0], "latent_image": ["l", 0], "seed": 3, "steps": 2, "cfg": 1.0}
    told |= {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "gain": 4.0, "prompt": ""}
    graph = {**loader(graphs.FLUX), **quantize(form="W8A8 int8"), **graphs.conditions()}
    graph |= {"v": node("VAELoader", vae_name=graphs.VAE)}
    graph |= {"k": node("QGenCompare", model_a=["m", 0], model_b=["q", 0], **told, vae=["v", 0])}
    graph |= {"r": node("QGenReport", model=["q", 0], order="worst first", layers=40)}
    graph |= {"show": node("PreviewImage", images=["k", 3]), "plot": node("PreviewImage", images=["r", 0])}
    shown = server.run(graph)
    assert shown["show"]["images"] and shown["plot"]["images"]
    table = shown["k"]["text"][0]
    psnr = float(next(line for line in table.splitlines() if line.startswith("PSNR")).split()[5])
    assert 15 < psnr < 80, table
    assert "double_blocks.0.img_attn.qkv" in shown["r"]["text"][0]
    same = {**graph, "k": node("QGenCompare", model_a=["m", 0], model_b=["m", 0], **told, vae=["v", 0])}
    assert "equal, bit for bit" in server.run(same)["k"]["text"][0]


def test_a_decoder_in_eight_bits_decodes_what_the_plain_one_decodes(server):
    told = {"positive": ["c", 0], "negative": ["c", 0], "latent_image": ["l", 0], "seed": 3, "steps": 2, "cfg": 1.0}
    graph = {**loader(graphs.FLUX), **sampler(["m", 0]), "v": node("VAELoader", vae_name=graphs.VAE)}
    graph |= {"q": node("QGenQuantizeVAE", vae=["v", 0], weights="int8", activations=False, part="decoder")}
    for name in ("v", "q"):
        graph |= {f"d{name}": node("VAEDecode", samples=["s", 0], vae=[name, 0])}
        graph |= {f"i{name}": node("SaveImage", images=[f"d{name}", 0], filename_prefix=f"decoded-{name}")}
    shown = server.run(graph)
    plain, packed = (graphs.picture(server, shown[f"i{name}"]["images"][0]) for name in ("v", "q"))
    error = float((plain - packed).square().mean().sqrt())
    assert 0 < error < 0.02 and float(plain.std()) > 0.05, told


def test_the_bridge_draws_with_a_quantized_pipeline(server):
    graph = {
        "p": node("QGenLoadPipeline", pipeline="built-in emoji demo", dtype="float32"),
        "q": node("QGenQuantizePipeline", pipe=["p", 0], recipe="rtn-int4", prompts="", steps=4, samples=2, seed=0),
    }
    told = {"prompt": "noto owl", "negative_prompt": "", "seed": 1, "steps": 6, "guidance": 3.0}
    told |= {"width": 0, "height": 0, "count": 1, "preview": True}
    for name in ("p", "q"):
        graph |= {f"d{name}": node("QGenSamplePipeline", pipe=[name, 0], **told)}
        graph |= {f"i{name}": node("SaveImage", images=[f"d{name}", 0], filename_prefix=f"bridge-{name}")}
    shown = server.run(graph)
    plain, packed = (graphs.picture(server, shown[f"i{name}"]["images"][0]) for name in ("p", "q"))
    assert plain.shape == (64, 64, 3) and float(plain.std()) > 0.1
    error = float((plain - packed).square().mean().sqrt())
    assert 0.001 < error < 0.35


def test_pages_and_workflows_are_served(server):
    for name in sorted(OURS):
        assert "# " in server.text(f"/extensions/{graphs.ROOT.name}/docs/{name}.md")
    listed = server.ask("/workflow_templates")[graphs.ROOT.name]
    assert set(listed) == {path.stem for path in (graphs.ROOT / "example_workflows").glob("*.json")}


def test_what_stands_for_a_file_is_asked_without_a_complaint(server):
    """A loader is not run again as long as its file is the same."""
    server.run({**loader(graphs.FLUX), **quantize(form="W8A8 int8"), **save("stamped")})
    graph = {"m": node("QGenLoadModel", file="stamped.safetensors", dtype="auto"), **sampler(["m", 0], seed=9)}
    server.run(graph)
    graph["s"]["inputs"]["seed"] = 10
    number = server.queue(graph)
    server.wait(number)
    told = server.ask(f"/history/{number}")[number]["status"]["messages"]
    cached = next(data["nodes"] for kind, data in told if kind == "execution_cached")
    assert "m" in cached and "unexpected keyword" not in server.said()


def test_comfyuis_own_modules_stay_what_they_were(server):
    said = server.said()
    assert "OTHER PACK: nodes is ComfyUI's: True; kernels is ours: False" in said
    assert "IMPORT FAILED: " + graphs.ROOT.name not in said
