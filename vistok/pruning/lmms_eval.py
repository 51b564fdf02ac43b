"""lmms-eval runs its benchmarks on pruned models: its own wrappers, with `vistok.prune` around the model they hold.

    lmms-eval --model vistok_qwen2_5_vl --tasks mmbench_en_dev \\
        --model_args pretrained=Qwen/Qwen2.5-VL-3B-Instruct,vistok_method=divprune,vistok_keep_ratio=0.25

Arguments that begin with `vistok_` are options of `vistok.prune`, the others the wrapper's. Without vistok_method nothing is pruned: run
that, and vistok_method=random, beside every figure. lmms-eval finds `manifests` through the entry point group "lmms_eval.models".
"""

BASES = ("llava_hf", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl_hf")
"""Wrappers of lmms-eval that hold a model of transformers as `_model`."""
_PREFIX = "vistok_"


def manifests() -> list:
    """What lmms-eval registers: each of BASES under its name with `vistok_` in front."""
    from lmms_eval.models import get_model_manifest
    from lmms_eval.models.registry_v2 import ModelManifest

    found = []
    for name in BASES:
        base = get_model_manifest(name)
        paths = {kind: f"{__name__}.{kind}_{name}" for kind in ("simple", "chat") if getattr(base, f"{kind}_class_path", None)}
        found.append(ModelManifest(model_id=_PREFIX + name, **{f"{kind}_class_path": path for kind, path in paths.items()}))
    return found


def pruned_class(base: type) -> type:
    """A wrapper class of lmms-eval whose model is pruned from the start.

    Raises ValueError: an option came without vistok_method, or the wrapper holds no model.
    """

    class Pruned(base):
        def __init__(self, *args, **options):
            own = {name.removeprefix(_PREFIX): options.pop(name) for name in list(options) if name.startswith(_PREFIX)}
            super().__init__(*args, **options)
            method = own.pop("method", None)
            if method is None and own:
                raise ValueError(f"{', '.join(_PREFIX + name for name in own)} without vistok_method")
            if method is not None:
                import vistok

                if not hasattr(self, "_model"):
                    raise ValueError(f"{base.__name__} holds no model as _model: it cannot be pruned")
                self.pruned = vistok.prune(self._model, method, **own)

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{base.__name__}"
    return Pruned


def __getattr__(name: str) -> type:
    kind, _, model = name.partition("_")
    if kind not in ("simple", "chat") or model not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models import get_model

    return pruned_class(get_model(model, force_simple=kind == "simple"))
