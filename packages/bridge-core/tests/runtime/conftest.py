"""Fixtures of the tests on real ranks."""

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folder of a model by its name, made once, with its weights in several files of at most a size."""
    from bridge_core.testing.hf_models import make_model, save_model

    made = {}

    def make(name, size="300KB"):
        if (name, size) not in made:
            made[name, size] = save_model(make_model(name), tmp_path_factory.mktemp(name) / "hf", max_shard_size=size)
        return made[name, size]

    return make
