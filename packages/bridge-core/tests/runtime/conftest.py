"""Fixtures of the tests on real ranks."""

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folder of a model by its name, made once, with its weights in several files."""
    from bridge_core.testing.hf_models import make_model, save_model

    made = {}

    def make(name):
        if name not in made:
            made[name] = save_model(make_model(name), tmp_path_factory.mktemp(name) / "hf", max_shard_size="300KB")
        return made[name]

    return make
