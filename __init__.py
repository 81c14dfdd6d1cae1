"""What ComfyUI runs when this checkout lies in its custom_nodes folder; inert everywhere else.

ComfyUI loads this file by its path and puts the folder on no search path, so the checkout's own qgen is loaded by path
too, not another one that happens to be installed. Outside ComfyUI (pytest reads this file as well) nothing is imported.
"""

import sys

if "comfy" in sys.modules or "folder_paths" in sys.modules:
    import logging
    from importlib.util import find_spec, module_from_spec, spec_from_file_location
    from pathlib import Path

    _package = Path(__file__).resolve().parent / "qgen"
    if "qgen" not in sys.modules:
        _spec = spec_from_file_location("qgen", _package / "__init__.py", submodule_search_locations=[str(_package)])
        sys.modules["qgen"] = module_from_spec(_spec)
        try:
            _spec.loader.exec_module(sys.modules["qgen"])
        except BaseException:
            del sys.modules["qgen"]  # a half-made module would hide the reason from the next import
            raise
    elif Path(sys.modules["qgen"].__file__ or "").resolve().parent != _package:
        logging.getLogger("qgen").warning(
            "another qgen was loaded first, from %s; the nodes of %s use that one",
            sys.modules["qgen"].__file__,
            _package.parent,
        )

    WEB_DIRECTORY = "./nodes/web"
    # The registry offers V3's `comfy_entrypoint` or V1's two mappings, never both: ComfyUI would only see V1's.
    if find_spec("qgen.nodes") and find_spec("qgen.nodes.registry"):
        from qgen.nodes import registry as _registry

        _offers = ("comfy_entrypoint", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")
        globals().update({name: getattr(_registry, name) for name in _offers if hasattr(_registry, name)})
    else:
        logging.getLogger("qgen").warning(
            "no nodes: %s has no nodes/registry.py; is the clone complete?", _package.parent
        )
