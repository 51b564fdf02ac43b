import json

import pytest

import vistok
from vistok.registry import create, describe, list_models, load, model_class, register, resolve


def test_presets_are_listed_and_created_with_overrides():
    assert {"flextok-tiny", "flextok-d12-d12", "fsq2d-tiny", "vae-small"} <= set(list_models())
    assert list_models("flextok-t*") == ["flextok-tiny"]
    assert vistok.create("fsq2d-tiny", levels=(4, 4)).codebook_size == 16


def test_an_unknown_preset_or_class_names_the_nearest_or_all():
    with pytest.raises(ValueError, match="flextok-tiny"):
        create("flextok-tyny")
    with pytest.raises(ValueError, match="known: .*FlexTok"):
        model_class("os.system")
    with pytest.raises(TypeError, match="colour"):
        create("fsq2d-tiny", colour=3)


def test_a_name_can_be_registered_once_only():
    def fsq2d_tiny():
        return None

    with pytest.raises(ValueError, match="registered already"):
        register(fsq2d_tiny)


def test_a_folder_loads_as_the_class_it_names_and_a_run_folder_loads_its_model(tmp_path):
    create("fsq2d-tiny").save_pretrained(tmp_path / "run" / "model")
    assert type(load(tmp_path / "run" / "model")).__name__ == "FSQ2D"
    assert type(load(tmp_path / "run")).__name__ == "FSQ2D"
    assert describe(resolve(tmp_path / "run"))["_class_name"] == "FSQ2D"


@pytest.mark.parametrize("name", ["os", "os.system", "DiffusionPipeline", None, 3, ["FSQ2D"]])
def test_a_folder_that_names_another_class_is_refused(tmp_path, name):
    create("fsq2d-tiny").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    with pytest.raises(ValueError):
        load(tmp_path)


@pytest.mark.parametrize("source", ["vistok/nothing-of-that-name", "vistok/../modeling", "./missing", "missing", "a/b/c", "~/x"])
def test_a_source_that_is_nothing_says_what_a_source_can_be(source):
    with pytest.raises(OSError, match="model"):
        load(source)
