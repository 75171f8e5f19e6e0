"""Students with a quantized cache: weights untouched, packed ones too; refusals in one line."""

import json
import shutil

import pytest
import torch

from harness import catalog
from harness.contract import Budget, Job
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from harness.models.cache_format import CacheFormat, stored_cache_format
from harness.models.checkpoint import describe, same_weights
from harness.models.language_model import open_model
from harness.models.shape import Shape


@pytest.fixture
def make(random_model, tmp_path):
    def build(name, base=random_model, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        job = Job(
            teachers=(random_model,),
            student=str(base.path),
            student_base=base,
            tasks={},
            source=LocalOrHubData(),
            budget=Budget(seen_tokens=1),
            seed=1,
            workdir=folder,
            cache=tmp_path / "cache",
        )
        return catalog.methods().build(name, settings).compress(job)

    return build


@pytest.mark.parametrize(("name", "bits", "group"), [("kv-int8", 8, 64), ("kv-int4", 4, 32)])
def test_a_student_has_the_weights_and_the_format_and_decodes_as_it_is_scored(
    make, random_model, name, bits, group
):
    student = make(name)
    assert same_weights(student.path, random_model.path) and student.digest != random_model.digest
    assert student.parents == (random_model.digest,)
    assert stored_cache_format(student.path) == CacheFormat(bits=bits, group=group)
    cost = json.loads((student.path.parent / "cost.json").read_text())
    assert cost["notes"][name]["probe_gap"] == 0  # the same kernels: equal to the last bit
    announced = (
        catalog.methods().build(name, {}).resulting_shape(Shape.of_folder(random_model.path))
    )
    assert announced.cache == Shape.of_folder(student.path).cache


def test_packed_weights_and_a_cache_of_codes_go_together_in_both_orders(make):
    packed_first = make("kv-int8", base=make("int4"), group_size=8)
    ids = torch.arange(5, 45)[None]
    assert stored_cache_format(packed_first.path) == CacheFormat(bits=8, group=8)
    with torch.no_grad():
        assert bool(torch.isfinite(open_model(packed_first).model(ids).logits).all())
    cache_first = make("int8", base=make("kv-int4"))
    assert stored_cache_format(cache_first.path) == CacheFormat(bits=4, group=32)
    with pytest.raises(CellFailed, match=r"kv-int4: kv-int8 has a quantized cache .*\(int8-8\)"):
        make("kv-int4", base=packed_first)


def test_what_cannot_have_one_is_refused_by_name(make, random_model, tmp_path):
    from families import saved_family

    with pytest.raises(CellFailed, match=r"layers of transformers' DynamicSlidingWindowLayer"):
        make("kv-int8", base=saved_family("Mistral", tmp_path / "windows"))
    folder = tmp_path / "strange"
    shutil.copytree(random_model.path, folder)
    adapter = describe(folder, name="strange")
    adapter = type(adapter)(**{**vars(adapter), "base": random_model.path})
    with pytest.raises(CellFailed, match="strange is an adapter or a file that another program"):
        make("kv-int4", base=adapter)
